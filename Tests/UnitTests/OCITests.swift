// SPDX-License-Identifier: Apache-2.0

import LaunchPlan
import Testing

@testable import Cgroups
@testable import OCIRuntime

@Suite("The OCI front end") struct OCITests {
  static let configuration = """
    {"ociVersion":"1.2.0","process":{"args":["sh"],"cwd":"/","env":["A=b"],"user":{"uid":1,"gid":2,"additionalGids":[3]},
    "capabilities":{"bounding":["CAP_KILL"]},"rlimits":[{"type":"RLIMIT_NOFILE","soft":1,"hard":18446744073709551615}]},
    "root":{"path":"rootfs"},"mounts":[{"destination":"/proc","type":"proc","source":"proc"},
    {"destination":"/a","source":"/b","options":["rbind","ro","rnosuid","noatime","rslave"]}],
    "linux":{"namespaces":[{"type":"mount"},{"type":"pid"},{"type":"network","path":"/proc/1/ns/net"}],
    "resources":{"memory":{"limit":1048576}},"maskedPaths":["/proc/kcore"]}}
    """

  @Test("a configuration becomes a plan whose first and last steps are where they must be") func plan() throws {
    let configuration = try Configuration(Array(OCITests.configuration.utf8), bundle: "/bundle")
    let state = ContainerState(id: "x", configuration: configuration, cgroup: nil, scope: "")
    let plan = try configuration.plan(nil, states: state, socket: "", cache: FilterCache("/nonexistent/x"))
    let lines = plan.operations.map(\.description)
    #expect(lines.contains("root directory  path=/bundle/rootfs"))
    #expect(lines.contains("join namespace  kind=1073741824  path=/proc/1/ns/net"))
    #expect(lines.contains { $0.hasPrefix("rlimit  resource=7  soft=1  hard=18446744073709551615  strict=1") })
    // ro and noatime on the mount, the field of access times cleared for it, nosuid on all below, slave with all below.
    #expect(
      lines.contains(
        "bind  source=/b  target=/a  attributes=17  cleared=112  recursively=2  cleared recursively=0  propagation=540672  recursive=1  follows=1  uids=[]  gids=[]  maps recursively=0"
      ))
    let names = plan.operations.map(\.name)
    let order = ["new namespaces", "root directory", "mask", "pivot root", "become undumpable", "await start", "become user", "execute"]
    let places = try order.map { try #require(names.firstIndex(of: $0)) }
    #expect(places == places.sorted(), "\(names)")
    #expect(names.last == "execute")
  }

  @Test("a configuration cut off anywhere, or with any byte changed, is refused or read; it never crashes") func corruption() {
    let bytes = Array(OCITests.configuration.utf8)
    for length in bytes.indices {
      #expect(throws: RuntimeError.self) { try Configuration(Array(bytes[..<length]), bundle: "/") }
    }
    for index in bytes.indices {
      for value: UInt8 in [0, 0x22, 0x5B, 0x7B, 0xFF] {
        var broken = bytes
        broken[index] = value
        _ = try? Configuration(broken, bundle: "/")
      }
    }
  }

  @Test("limits become the files of each layout") func resources() {
    var resources = Resources()
    (resources.memory, resources.memoryAndSwap, resources.pids) = (100 << 20, 150 << 20, -1)
    (resources.cpuQuota, resources.cpuPeriod, resources.cpuShares) = (50_000, 100_000, 1024)
    func text(_ layout: CgroupLayout) -> [String] { resources.values(layout).map { "\($0.file)=\($0.text)" } }
    #expect(
      text(.unified) == [
        "memory.max=104857600", "memory.oom.group=0", "memory.swap.max=52428800", "cpu.weight=39", "cpu.max=50000 100000", "pids.max=max",
      ])
    #expect(
      text(.legacy) == [
        "memory.limit_in_bytes=104857600", "memory.memsw.limit_in_bytes=157286400", "cpu.shares=1024", "cpu.cfs_period_us=100000",
        "cpu.cfs_quota_us=50000", "pids.max=max",
      ])
  }

  @Test("the device program gives the verdicts of its rules, the last that matches first") func deviceProgram() {
    let rules = [
      DeviceRule(allows: false, kind: .all, major: nil, minor: nil, access: "rwm"),
      DeviceRule(allows: true, kind: .character, major: 1, minor: 3, access: "rw"),
      DeviceRule(allows: true, kind: .block, major: nil, minor: nil, access: "m"),
      DeviceRule(allows: false, kind: .block, major: 8, minor: nil, access: "m"),
    ]
    let program = DeviceProgram.compile(rules)
    // kind (1 block, 2 character), access (1 mknod, 2 read, 4 write), major, minor
    func verdict(_ kind: UInt64, _ access: UInt64, _ major: UInt64, _ minor: UInt64) -> UInt64 {
      var interpreter = Interpreter(context: [kind | access << 16, major, minor])
      return interpreter.run(program)
    }
    #expect(verdict(2, 2, 1, 3) == 1 && verdict(2, 6, 1, 3) == 1 && verdict(2, 4, 1, 3) == 1)
    #expect(verdict(2, 1, 1, 3) == 0, "making was not allowed")
    #expect(verdict(2, 3, 1, 3) == 0, "an allowance covers all that is asked")
    #expect(verdict(1, 1, 9, 0) == 1 && verdict(1, 1, 8, 0) == 0 && verdict(1, 2, 9, 0) == 0 && verdict(2, 2, 1, 5) == 0)
  }
}

/// As much of BPF as the program uses, so that its verdicts can be checked without a kernel that loads it.
private struct Interpreter {
  var context: [UInt64]
  var registers = [UInt64](repeating: 0, count: 11)

  init(context: [UInt64]) { self.context = context }

  mutating func run(_ program: [UInt64]) -> UInt64 {
    var at = 0
    while true {
      let line = program[at]
      let (to, from) = (Int(line >> 8 & 15), Int(line >> 12 & 15))
      let (offset, value) = (Int(Int16(truncatingIfNeeded: line >> 16)), line >> 32)
      at += 1
      switch line & 0xFF {
      case 0x61: registers[to] = context[offset / 4]
      case 0xBF: registers[to] = registers[from]
      case 0xB7: registers[to] = value
      case 0x57: registers[to] &= value
      case 0x77: registers[to] >>= value
      case 0x55: if registers[to] != value { at += offset }
      case 0x15: if registers[to] == value { at += offset }
      case 0x5D: if registers[to] != registers[from] { at += offset }
      case 0x95: return registers[0]
      default: return .max
      }
    }
  }
}
