// SPDX-License-Identifier: Apache-2.0

import ShimProtocol
import Foundation
import LaunchPlan
import Linux
import Testing

@testable import Cgroups

@Suite("Limits", .enabled(if: Box.available), .serialized) struct LimitTests {
  private let hog = "dd if=/dev/zero of=/dev/null bs=200M count=1 2>/dev/null; echo $?"

  @Test("memory: what passes the limit is killed and counted") func memory() async throws {
    let box = try Box()
    let result = try await box.run(try box.plan(hog))
    #expect(result.output == "137\n")
    #expect(result.usage.outOfMemoryKills == 1)
    #expect(result.usage.memoryLimitBytes == 64 << 20)
    #expect(result.usage.memoryPeakBytes > 60 << 20)
    #expect(try await Box().output(hog) { $0.without("join cgroup") } == "0\n", "control: outside the cgroup it passes")
  }

  @Test("processes: a fork bomb stays below its limit") func processes() async throws {
    let bomb = "i=0; while [ $i -lt 200 ]; do sleep 2 & i=$((i+1)); done 2>/dev/null; ls /proc | grep -c '^[0-9]'"
    let box = try Box()
    let result = try await box.run(try box.plan(bomb + "; true"))
    let count = Int(result.output.split(separator: "\n").last ?? "") ?? -1
    #expect(count <= 64, "\(result.output)")
    let free = try await Box().output(bomb) { $0.without("join cgroup") }
    #expect((Int(free.split(separator: "\n").last ?? "") ?? 0) > 150, "control")
  }

  @Test("CPU: half of one is half of one") func cpu() async throws {
    // By what the kernel counts and not by the time it took alone: a busy machine gives nobody a whole CPU.
    func run(milliCPUs: UInt64) async throws -> (share: Double, throttled: Int) {
      let box = try Box()
      try box.limit(Resources(memoryBytes: 64 << 20, milliCPUs: milliCPUs, pids: 64))
      let start = Clock.monotonic
      let result = try await box.run(try box.plan("i=0; while [ $i -lt 400000 ]; do i=$((i+1)); done"))
      let share = Double(result.usage.cpuNanoseconds) / Double(Clock.monotonic - start)
      let statistics = try String(contentsOfFile: box.cgroup.folder("cpu") + "/cpu.stat", encoding: .utf8).split(separator: "\n")
      let line = try #require(statistics.first { $0.hasPrefix("nr_throttled ") })
      return (share, Int(line.dropFirst(13)) ?? -1)
    }
    let half = try await run(milliCPUs: 500)
    #expect(half.share < 0.65, "used \(half.share) CPUs")
    let whole = try await run(milliCPUs: 1000)
    #expect(half.throttled >= 5 && whole.throttled < 3, "control: \(half) against \(whole)")
  }

  @Test("scratch and /dev/shm end where they were told to") func scratch() async throws {
    let probe =
      "dd if=/dev/zero of=/tmp/f bs=1M count=20 2>/dev/null; stat -c %s /tmp/f; dd if=/dev/zero of=/dev/shm/f bs=1M count=5 2>/dev/null; stat -c %s /dev/shm/f"
    let sizes = try await Box().output(probe).split(separator: "\n").compactMap { Int($0) }
    #expect(sizes.count == 2 && sizes[0] <= 8 << 20 && sizes[1] <= 1 << 20, "\(sizes)")
  }

  @Test("a flood of output is bounded on disk and does not hold up the program") func flood() async throws {
    let box = try Box()
    let result = try await box.run(try box.plan("yes 0123456789 | head -c 4000000; echo done"))
    #expect(result.record == .ended(.exited(0)))
    let folder = box.path + "/log"
    let size = try FileManager.default.contentsOfDirectory(atPath: folder).reduce(0) {
      $0 + (try FileManager.default.attributesOfItem(atPath: "\(folder)/\($1)")[.size] as? Int ?? 0)
    }
    #expect(size < 3 * 3 * 65_536, "\(size) bytes")
    #expect(result.output.hasSuffix("done\n"))
  }

  @Test("a value that the kernel does not take is found out") func readBack() throws {
    let box = try Box()
    #expect(throws: CgroupError.self) { try box.limit(Resources(memoryBytes: 64 << 20, milliCPUs: 1000, pids: .max)) }
  }

  @Test("the kernel loads device programs, and what they forbid cannot be opened") func deviceProgram() async throws {
    let folder = try CgroupLayout.detect() == .unified ? CgroupLayout.root : CgroupLayout.root + "/unified"
    // Nothing to attach to on a host with v1 hierarchies alone.
    guard Process.exists(folder + "/cgroup.procs") else { return }
    let box = try Box()
    let null = DeviceRule(allows: true, kind: .character, major: 1, minor: 3, access: "rwm")
    let all = DeviceRule(allows: false, kind: .all, major: nil, minor: nil, access: "rwm")
    let unified = try Descriptor.open(try #require(box.cgroup.unifiedPath), [.readOnly, .directory])
    #expect(try await box.run(try box.plan("head -c 1 /dev/zero | wc -c")).output == "1\n", "control: before, it can be read")
    let other = try Box()
    let shut = try Descriptor.open(try #require(other.cgroup.unifiedPath), [.readOnly, .directory])
    try Filter.attachDeviceProgram(DeviceProgram.compile([all, null]), to: shut)
    let probe = "head -c 1 /dev/zero 2>/dev/null | wc -c; echo x >/dev/null && echo null"
    #expect(try await other.run(try other.plan(probe)).output == "0\nnull\n")
    // Each shape of rule is a program that the kernel takes.
    for rules in [[], [all], [null], [all, DeviceRule(allows: false, kind: .block, major: 8, minor: nil, access: "rm"), null]] {
      try Filter.attachDeviceProgram(DeviceProgram.compile(rules), to: unified)
    }
  }
}
