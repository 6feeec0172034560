// SPDX-License-Identifier: Apache-2.0

/// Runs `body` in a task of its own, which ends with this call and is cancelled with the calling task. A task keeps the memory of its
/// deepest call until it ends, so that one that lives long makes its deep calls in tasks that do not.
package func apart<T: Sendable>(_ body: @escaping @Sendable () async -> T) async -> T {
  // Not `async let`, whose buffer would take 640 B in the frame of the caller.
  let task = Task { await body() }
  return await withTaskCancellationHandler {
    await task.value
  } onCancel: {
    task.cancel()
  }
}
