// SPDX-License-Identifier: Apache-2.0

internal import Foundation

@testable internal import LaunchPlan
@testable internal import Cgroups
@testable internal import Linux
@testable internal import OCIRuntime
@testable internal import Procfs
@testable internal import Broker
@testable internal import Executor
@testable internal import ShimProtocol

private func check<M: WireMessage>(_ type: M.Type, _ bytes: [UInt8]) {
  guard let message = try? M(decoding: bytes) else { return }
  guard let again = try? M(decoding: message.encoded()) else { preconditionFailure("a message cannot be read again") }
  // What is of a later release, or malformed, is known by its id alone.
  switch (message as? AgentMessage, again as? AgentMessage) {
  case (.malformed(let id)?, .unsupported(let other)?), (.unsupported(let id)?, .unsupported(let other)?): precondition(id == other)
  default: precondition(again == message, "a message changed on its way")
  }
}

/// What is fed: each reads the bytes as what it is named for. Whatever they are, nothing may trap, and what was accepted must
/// survive being written and read again.
private let targets: [String: @Sendable ([UInt8]) -> Void] = [
  "plan": { bytes in
    guard let plan = try? Plan(decoding: bytes) else { return }
    precondition((try? Plan(decoding: plan.encoded())) == plan, "a plan changed on its way")
    for operation in plan.operations { precondition(!operation.description.isEmpty) }
  },
  "message": { bytes in
    check(AgentMessage.self, bytes)
    check(SupervisorMessage.self, bytes)
    check(InitRequest.self, bytes)
    check(InitReport.self, bytes)
    check(InjectorRequest.self, bytes)
    check(InjectorReport.self, bytes)
  },
  "broker": { bytes in
    var broker = CredentialBroker(listener: nothing, token: Array("secret".utf8))
    broker.put("reader", Array("{}".utf8), expires: 2)
    guard let answer = broker.answer(bytes, now: 1) else { return precondition(bytes.count <= CredentialBroker.requestLimit) }
    let isGiven = answer.starts(with: "HTTP/1.1 200 ".utf8)
    precondition(isGiven == (broker.issues.count == 1), "given and not counted, or the other way")
    precondition(!isGiven || String(decoding: bytes, as: UTF8.self).contains("secret"), "given without the token")
  },
  "config": { bytes in
    guard let configuration = try? Configuration(bytes, bundle: "/bundle") else { return }
    let state = ContainerState(id: "x", configuration: configuration, cgroup: nil, scope: "")
    _ = try? SystemdScope((try? configuration.linux.string("cgroupsPath")) ?? "", id: "x")
    guard let plan = try? configuration.plan(nil, states: state, socket: "", cache: nowhere) else { return }
    precondition((try? Plan(decoding: plan.encoded())) == plan, "the plan of a configuration changed on its way")
    for operation in plan.operations { if case .joinNamespace(_, let path) = operation { precondition(path.hasPrefix("/")) } }
  },
  "seccomp": { bytes in
    guard let json = try? JSON(parsing: bytes, name: "seccomp") else { return }
    guard let steps = try? SeccompReader.operations(json, ["{", "}"], cache: nowhere) else { return }
    // Loadable as far as its length tells (seccomp(2): 4096 instructions at the most are checked by the kernel).
    for step in steps { if case .seccomp(let program, _) = step { precondition(program.count % 8 == 0 && !program.isEmpty) } }
  },
  "resources": { bytes in
    guard let json = try? JSON(parsing: bytes, name: "resources"), let resources = try? ResourcesReader.read(json) else { return }
    for layout in [CgroupLayout.unified, .hybrid, .legacy] {
      for value in resources.values(layout) {
        precondition(!value.file.contains("/"), "a limit outside its cgroup")
      }
    }
    if let rules = try? ResourcesReader.deviceRules(json) { precondition(!DeviceProgram.compile(rules).isEmpty) }
  },
  "state": { bytes in
    guard let state = try? ContainerState(parsing: bytes) else { return }
    precondition((try? ContainerState(parsing: Array(state.encoded().utf8))) != nil, "a state cannot be read back")
  },
  "git": { bytes in
    guard case .found(let path) = GitHelper.place(in: bytes) else { return }
    precondition(path.hasPrefix("/git/") && path.split(separator: "/").count == 3, "a request of another shape")
    precondition(path.utf8.allSatisfy { (0x2D...0x7A).contains($0) && $0 != 0x3B }, "a request that breaks out of its line")
  },
  "password": { bytes in
    if let home = PasswordFile.home(of: 7, in: bytes) { precondition(home.hasPrefix("/") && !home.utf8.contains(0), "no home") }
  },
  "proc": { bytes in
    _ = CgroupLayout.hierarchies(parsing: bytes)
    _ = ProcessStat(parsing: bytes)
    _ = Containers.id(Substring(String(decoding: bytes, as: UTF8.self)))
  },
]

private let nothing: Handle = {
  guard let pipe = try? Linux.Pipe() else { fatalError("no pipe") }
  return pipe.reading
}()
private let nowhere = FilterCache("/nonexistent/filters")

/// Chosen by the environment, since libFuzzer takes the arguments.
private let chosen: @Sendable ([UInt8]) -> Void = {
  let name = ProcessInfo.processInfo.environment["CARREL_FUZZ_TARGET"] ?? ""
  guard let target = targets[name] else {
    print("CARREL_FUZZ_TARGET: expected one of \(targets.keys.sorted().joined(separator: " "))")
    exit(2)
  }
  return target
}()

@_cdecl("LLVMFuzzerTestOneInput") public func feed(_ data: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
  chosen(Array(UnsafeBufferPointer(start: data, count: count)))
  return 0
}

private typealias CArguments = UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>

@_silgen_name("LLVMFuzzerRunDriver") private func runDriver(
  _ count: UnsafeMutablePointer<CInt>, _ arguments: UnsafeMutablePointer<CArguments?>,
  _ feed: @convention(c) (UnsafePointer<UInt8>?, Int) -> CInt
) -> CInt

/// SwiftPM links `main` to this name.
@_cdecl("Fuzz_main") public func fuzz(_ count: CInt, _ arguments: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?) -> CInt {
  var (count, arguments) = (count, arguments)
  return runDriver(&count, &arguments) { feed($0, $1) }
}
