// SPDX-License-Identifier: Apache-2.0

import Glibc
import Testing

@testable import Procfs

@Suite("What /proc says") struct ProcfsTests {
  static let table = MountTable(
    parsing: Array(
      """
      22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
      25 22 0:21 / /proc rw,nosuid shared:5 master:1 - proc proc rw
      40 22 0:50 / /srv/my\\040homes rw - nfs4 10.0.0.1:/homes rw
      41 40 0:51 / /srv/my\\040homes/back\\134slash rw - tmpfs tmpfs rw
      42 22 0:52 / /srv/my\\040homes rw - xfs /dev/vdb rw
      broken line
      """.utf8))

  @Test("a table of mounts is read, with the characters that the kernel escapes") func mounts() {
    #expect(Self.table.points == ["/", "/proc", "/srv/my homes", "/srv/my homes/back\\slash", "/srv/my homes"])
    #expect(Self.table.fileSystem(of: "/etc/passwd") == "ext4")
    #expect(Self.table.fileSystem(of: "/srv/my homes/back\\slash/x") == "tmpfs")
    #expect(Self.table.fileSystem(of: "/srv/my homes2") == "ext4")
    #expect(MountTable()?.fileSystem(of: "/proc/self") == "proc")
  }

  @Test("of two mounts at one point, the later one is the file system of a path there") func covered() {
    #expect(Self.table.fileSystem(of: "/srv/my homes/ada") == "xfs")
  }

  @Test("the kernel's log says which process of a cgroup was OOM-killed, and of no other cgroup") func kills() {
    func scan(_ cgroup: String, after seen: UInt64 = 0) -> KernelLog.OOMKill? {
      var scan = KernelLog.Scan(cgroup: cgroup, seen: seen)
      for line in [
        "6,7,100,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),oom_memcg=/carrel/x,task_memcg=/carrel/x/in,task=py,pid=70,uid=0",
        "3,8,101,-;Memory cgroup out of memory: Killed process 70 (py (x)) total-vm:9kB, anon-rss:2kB, file-rss:3kB, shmem-rss:4kB, UID:0",
        "6,9,102,-;oom-kill:constraint=CONSTRAINT_MEMCG,task_memcg=/carrel/xy,task=R,pid=71,uid=0", "not a record",
      ] { scan.read(line) }
      return scan.found
    }
    #expect(scan("carrel/x") == KernelLog.OOMKill(pid: 70, name: "py (x)", residentBytes: 9 * 1024, record: 8))
    #expect(scan("carrel/x", after: 8) == nil && scan("carrel/y") == nil)
  }

  @Test("a process's name and the names of its variables are read") func process() {
    let own = ProcessDirectory(getpid())
    #expect(own.name?.isEmpty == false)
    #expect(own.environmentNames?.contains("PATH") == true && !own.isInit)
    #expect(ProcessDirectory(0).name == nil)
  }

  @Test("a default route's link is an uplink") func routes() {
    let table = "Iface\tDestination\tGateway\neth0\t00000000\t0100000A\neth1\t0000000A\t00000000\n"
    #expect(RouteTable.uplinks(parsing: Array(table.utf8)) == ["eth0"])
  }
}
