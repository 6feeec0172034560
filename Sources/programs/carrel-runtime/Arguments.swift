// SPDX-License-Identifier: Apache-2.0

/// Options before operands, in the syntax of runc and crun: `--name value`, `--name=value`, `--flag`, `-n value`.
struct Arguments {
  struct Option: Sendable {
    let names: [String]
    let takesValue: Bool
    let help: String

    static func value(_ names: String..., help: String) -> Option { Option(names: names, takesValue: true, help: help) }
    static func flag(_ names: String..., help: String) -> Option { Option(names: names, takesValue: false, help: help) }
  }

  /// The kernel's default maximum of open files of a process (fs.nr_open).
  static let descriptorLimit: UInt32 = 1 << 20

  private var values: [(name: String, value: String)] = []
  private(set) var operands: [String] = []

  /// Parses up to the first operand; if `mixed`, also options after operands.
  init(_ arguments: ArraySlice<String>, _ options: [Option], mixed: Bool = false) throws(RuntimeError) {
    var rest = arguments
    while let first = rest.first {
      rest = rest.dropFirst()
      if first == "--" {
        operands += rest
        return
      }
      guard first.utf8.first == UInt8(ascii: "-"), first != "-" else {
        operands.append(first)
        if mixed { continue }
        operands += rest
        return
      }
      let parts = first.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      let name = String(parts[0].drop { $0 == "-" })
      guard let option = options.first(where: { $0.names.contains(name) }) else { throw RuntimeError("\(parts[0]): unknown option") }
      let canonical = option.names[0]
      if parts.count > 1 {
        values.append((canonical, String(parts[1])))
      } else if option.takesValue {
        guard let value = rest.first else { throw RuntimeError("\(parts[0]): expected a value") }
        rest = rest.dropFirst()
        values.append((canonical, value))
      } else {
        values.append((canonical, "true"))
      }
    }
  }

  func value(_ name: String) -> String? { values.last { $0.name == name }?.value }
  func values(_ name: String) -> [String] { values.filter { $0.name == name }.map { $0.value } }
  func has(_ name: String) -> Bool { value(name).map { $0 != "false" } ?? false }

  func number(_ name: String) throws(RuntimeError) -> UInt32? {
    guard let text = value(name) else { return nil }
    guard let number = UInt32(text) else { throw RuntimeError("--\(name) \(text): expected a number") }
    return number
  }

  func operand(_ index: Int, _ what: String) throws(RuntimeError) -> String {
    guard index < operands.count else { throw RuntimeError("expected \(what)") }
    return operands[index]
  }
}
