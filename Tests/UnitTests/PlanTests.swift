// SPDX-License-Identifier: Apache-2.0

internal import Isolation
import Testing

@testable import LaunchPlan

@Suite("The launch plan") struct PlanTests {
  static let bind: BindOptions = {
    var options = BindOptions(change: MountChange(set: 6, clear: 1))
    options.change.recursiveSet = 1
    options.recursive = true
    options.followsSource = true
    options.uids = [IDRange(inside: 2001, outside: 1000, count: 1)]
    options.gids = [IDRange(inside: 2002, outside: 1001, count: 1)]
    return options
  }()
  static let sets: CapabilitySets = {
    var sets = CapabilitySets()
    (sets.bounding, sets.effective, sets.permitted, sets.inheritable, sets.ambient) = (1, 2, 3, 4, 5)
    return sets
  }()
  static let scheduler: Scheduler = {
    var scheduler = Scheduler()
    (scheduler.policy, scheduler.flags, scheduler.nice, scheduler.priority) = (6, 1, -5, 7)
    (scheduler.runtime, scheduler.deadline, scheduler.period) = (1, 2, 3)
    return scheduler
  }()
  static let everyOperation: [Operation] = [
    .cgroup(path: "/sys/fs/cgroup/a"),
    .userNamespace(
      owner: 1_048_576, uids: [IDRange(inside: 0, outside: 1_048_576, count: 65_536)],
      gids: [IDRange(inside: 0, outside: 5, count: 1), IDRange(inside: 1, outside: 9, count: 2)]),
    .namespaces(0x2000_0000), .joinNamespace(kind: 0x4000_0000, path: "/proc/1/ns/net"), .layer(path: "/layers/a"),
    .root(scratchBytes: 1, scratchInodes: 2), .rootDirectory(path: "/bundle/rootfs"),
    .attributes(path: "/", change: MountChange(set: 1, clear: 2, propagation: 1 << 18)),
    .directory(path: "/tmp", mode: 0o1777, uid: 0, gid: 0), .bind(source: "/a", target: "/b", options: bind),
    .bind(source: "/a", target: "/b", options: BindOptions(change: MountChange(set: 7))), .secrets(target: "/run/s", bytes: 3),
    .fileSystem(type: "tmpfs", source: "t", target: "/t", options: ["size=1", "x"], change: MountChange(set: 3), copyUp: true),
    .cgroupFileSystem(hierarchies: ["memory", "cpu"], target: "/c", attributes: 3), .device(path: "/dev/null", major: 1, minor: 3),
    .outerNode(path: "/dev/x", mode: 0o20600, major: 1, minor: 5, uid: 10, gid: 11),
    .node(path: "/dev/x", mode: 0o020600, major: 1, minor: 2, uid: 3, gid: 4), .symlink(path: "/a", target: "b"),
    .file(path: "/etc/hosts", mode: 0o644, content: [0, 255, 10]), .mask(path: "/proc/kcore"), .readOnly(path: "/proc/sys"),
    .pivotRoot, .workingDirectory(path: "/w"), .hostname("w"), .domainname("d"), .sysctl(key: "user.max_user_namespaces", value: "0"),
    .resourceLimit(resource: 4, soft: 0, hard: .max, strict: true), .outOfMemoryScore(-500), .personality(8),
    .label(file: "exec", text: "x"), .scheduler(scheduler), .ioPriority(1 << 13), .cpuAffinity([3]),
    .seccompListener(socket: "/s", state: ["{", "}"]), .timeOffsets(["boottime 1 2"]), .sessionKeyring, .cgroupNamespace, .rendezvous,
    .hook(arguments: ["/bin/a", "b"], environment: ["C=d"], seconds: 5, input: ["{", "}"]),
    .terminal(socket: "/s", rows: 24, columns: 80), .awaitStart,
    .user(uid: 1000, gid: 1000, groups: [1000, 20], mask: 0o022, capabilities: sets), .undumpable, .noNewPrivileges,
    .seccomp(program: [1, 2, 3], flags: 2), .log(segmentBytes: 1, segments: 2, bytesPerSecond: 3),
    .execute(arguments: ["a", ""], environment: ["A=ü"], directory: "/"), .namespaceRoot, .slaveMounts, .fileMask(0o22), .followSymlinks,
    .closeDescriptors(from: 5),
  ]

  @Test("every operation survives encoding and decoding") func roundTrip() throws {
    let plan = Plan(PlanTests.everyOperation)
    #expect(try Plan(decoding: plan.encoded()) == plan)
  }

  @Test("every kind of operation is in the round trip, and an operation has the kind that it is decoded as") func kinds() {
    #expect(Set(PlanTests.everyOperation.map(\.kind)) == Set(Operation.Kind.allCases))
    for kind in Operation.Kind.allCases { #expect(kind.definition.blank.kind == kind) }
    #expect(Set(Operation.Kind.allCases.map(\.definition.name)).count == Operation.Kind.allCases.count)
  }

  @Test("a plan of a release whose executor did more than the plan says is refused") func otherVersion() {
    var bytes = Plan([.pivotRoot]).encoded()
    bytes[Plan.magic.count] = 3
    #expect { try Plan(decoding: bytes) } throws: { ($0 as? PlanError)?.problem == .otherVersion }
  }

  @Test("a plan cut off anywhere is refused and never crashes") func truncation() {
    let bytes = Plan(PlanTests.everyOperation).encoded()
    for length in 0..<bytes.count {
      #expect(throws: PlanError.self) { try Plan(decoding: Array(bytes[..<length])) }
    }
  }

  @Test("a flipped byte is refused or decodes to a plan that encodes again") func corruption() throws {
    let bytes = Plan(PlanTests.everyOperation).encoded()
    for index in bytes.indices {
      var broken = bytes
      broken[index] ^= 0xFF
      if let plan = try? Plan(decoding: broken) { #expect(try Plan(decoding: plan.encoded()) == plan) }
    }
  }

  @Test(
    "bad plans are named by their problem",
    arguments: [
      ([], PlanError.Problem.truncated), (Array("XXXX".utf8), .notAPlan), (Plan.magic + [9, 0, 0, 0, 0], .otherVersion),
      (Plan.magic + [4, 0, 0, 0, 0, 7], .trailingBytes), (Plan.magic + [4, 1, 0, 0, 0, 250, 0], .unknownOperation),
      (Plan.magic + [4, 1, 0, 0, 0, 4, 1, 1], .wrongField), (Plan.magic + [4, 1, 0, 0, 0, 4, 1, 2, 255, 255, 255, 255], .truncated),
      (Plan.magic + [4, 1, 0, 0, 0, 4, 1, 2, 1, 0, 0, 0, 0], .textHoldsNUL), (Plan.magic + [4, 1, 0, 0, 0, 20, 3], .wrongField),
      (Plan.magic + [4, 1, 0, 0, 0, 24, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0], .numberOutOfRange),
      (Plan.magic + [4, 255, 255, 255, 255], .truncated),
    ] as [([UInt8], PlanError.Problem)])
  func problems(bytes: [UInt8], problem: PlanError.Problem) {
    #expect { try Plan(decoding: bytes) } throws: { ($0 as? PlanError)?.problem == problem }
  }

  @Test("the default isolation keeps the orders that matter") func order() throws {
    var box = SandboxSpec()
    box.cgroups = ["/sys/fs/cgroup/x"]
    let names = PlanCompiler.compile(box, seccomp: [0]).operations.map(\.name)
    func at(_ name: String) throws -> Int { try #require(names.firstIndex(of: name)) }
    #expect(names.first == "close descriptors")
    #expect(try at("new user namespace") < at("become root of the user namespace"))
    #expect(try at("make mounts slaves of the host's") < at("overlay root"))
    #expect(try at("join cgroup") < at("new cgroup namespace"))
    #expect(try at("new cgroup namespace") < at("mount cgroup"))
    #expect(try at("sysctl") < at("make read-only"))
    #expect(try at("become user") < at("become undumpable"))
    #expect(try at("no new privileges") < at("load seccomp filter"))
    #expect(try at("load seccomp filter") > at("pivot root"))
    #expect(names.last == "execute")
  }

  @Test("operations print as one line each") func description() {
    #expect(Operation.directory(path: "/tmp", mode: 0o1777, uid: 0, gid: 0).description == "directory  path=/tmp  mode=01777  uid=0  gid=0")
    #expect(Operation.seccomp(program: [1, 2], flags: 0).description == "load seccomp filter  program=<2 bytes>  flags=0")
  }
}
