// SPDX-License-Identifier: Apache-2.0

/// A value behind a reference. Records are copied into the frames of many suspended tasks, each of which keeps its copy for as long as the
/// workspace runs, so that their large fields are not stored inline.
@propertyWrapper
package struct Boxed<Value: Sendable>: Sendable {
  private final class Storage: Sendable {
    let value: Value
    init(_ value: Value) { self.value = value }
  }

  private var storage: Storage

  package init(wrappedValue: Value) { storage = Storage(wrappedValue) }

  package var wrappedValue: Value {
    get { storage.value }
    set { storage = Storage(newValue) }
  }
}
