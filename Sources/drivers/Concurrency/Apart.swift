// SPDX-License-Identifier: Apache-2.0

/// Runs `body` in a child task. A task keeps the memory of its deepest call until it ends, so that one that lives long makes its deep calls
/// in tasks that do not.
package func apart<T: Sendable>(_ body: @escaping @Sendable () async -> T) async -> T {
  async let value = body()
  return await value
}
