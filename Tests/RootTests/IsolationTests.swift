// SPDX-License-Identifier: Apache-2.0

import ShimProtocol
import Foundation
import Isolation
import LaunchPlan
import Linux
import ShimClient
import Testing

/// Each defence is probed from inside, once with it and once without: a test that passes either way says nothing.
@Suite("Isolation", .enabled(if: Box.available), .serialized) struct IsolationTests {
  @Test("no capability in any set") func capabilities() async throws {
    let probe = "grep -E '^Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status | awk '{print $2}' | tr -d '0\\n'"
    #expect(try await Box().output(probe) == "")
    let bare = try await Box().output(probe, uid: 0) { $0.without("become user") }
    #expect(bare.contains("f"), "control: without the step there are capabilities")
  }

  @Test("no new privileges, and a filter") func privileges() async throws {
    let probe = "grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status | awk '{print $2}' | tr -d '\\n'"
    #expect(try await Box().output(probe) == "12")
    #expect(try await Box().output(probe) { $0.without("no new privileges", "load seccomp filter") } == "00")
  }

  @Test("no namespace can be made inside") func namespaces() async throws {
    let probe = "unshare -U true 2>/dev/null && echo made || echo refused"
    #expect(try await Box().output(probe) == "refused\n")
    #expect(try await Box().output(probe) { $0.without("load seccomp filter") } == "refused\n", "the sysctl alone holds too")
    #expect(try await Box().output(probe) { $0.without("load seccomp filter", "sysctl") } == "made\n", "control")
  }

  @Test("root inside cannot mount") func mounting() async throws {
    let probe = "mount -t tmpfs none /tmp 2>/dev/null && echo mounted || echo refused"
    #expect(try await Box().output(probe, uid: 0) == "refused\n")
    let bare = try await Box().output(probe, uid: 0) { $0.without("load seccomp filter", "become user") }
    #expect(bare == "mounted\n", "control")
  }

  @Test("only its own processes are there") func processes() async throws {
    // PID 1, the shell, and what the shell starts.
    #expect(try await Box().output("ls /proc | grep -c '^[0-9]'").count == 2, "one digit and a newline")
    let outside = try FileManager.default.contentsOfDirectory(atPath: "/proc").filter { Int($0) != nil }.count
    #expect(outside > 9, "control: the same count outside")
  }

  @Test("masked paths are empty") func masks() async throws {
    let probe = "cat /proc/interrupts /proc/timer_list | wc -c"
    #expect(try await Box().output(probe) == "0\n")
    #expect(try await Box().output(probe) { $0.without("mask") } != "0\n", "control")
  }

  @Test("/proc/sys is read-only even for root inside") func readOnlyPaths() async throws {
    let probe = "echo 7 > /proc/sys/user/max_ipc_namespaces && echo written || echo refused"
    #expect(try await Box().output("(\(probe)) 2>/dev/null", uid: 0) == "refused\n")
    let bare = try await Box().output("(\(probe)) 2>/dev/null", uid: 0) {
      $0.without("make read-only", "become user")
    }
    #expect(bare == "written\n", "control")
  }

  @Test("ids inside are those of its own range outside, and never below 100000") func idMap() async throws {
    let box = try Box()
    let map = try await box.output("cat /proc/self/uid_map /proc/self/gid_map | awk '{print $1, $2, $3}'")
    #expect(map == "0 \(box.firstID) 65536\n0 \(box.firstID) 65536\n")
    let host = try String(contentsOfFile: "/proc/self/uid_map", encoding: .utf8).split(whereSeparator: \.isWhitespace)
    #expect(host.first == "0" && host[1] == "0", "control: outside, 0 is 0")
  }

  @Test("the user namespace belongs to the workspace's own host uid") func namespaceOwner() async throws {
    let box = try Box()
    _ = try await box.run(try box.plan("sleep 0.2")) { _, pid in
      // Root inside owns files of the namespace's own proc; NS_GET_OWNER_UID would say the same.
      let owner = try Descriptor.open("/proc/\(pid)/root/dev/shm", [.path]).status().uid
      #expect(owner == box.firstID)
    }
  }

  @Test("a home appears as the workspace's user, and stays the owner's on disk") func home() async throws {
    let box = try Box()
    let home = box.path + "/home"
    try FileManager.default.createDirectory(atPath: home, withIntermediateDirectories: true)
    chown(home, 2001, 2002)
    func bind(_ ids: IDMapping?) -> (inout [LaunchPlan.Operation]) -> Void {
      { operations in
        let at = operations.firstIndex { $0.name == "secrets" } ?? 0
        let change = MountChange(set: 6)
        operations.insert(
          .bind(source: home, target: "/home", options: ids?.options(change, first: box.firstID) ?? BindOptions(change: change)), at: at)
      }
    }
    let probe = "stat -c %u /home; echo work > /home/file && echo written; grep ' /home ' /proc/self/mountinfo | grep -c nosuid,nodev"
    let mapped = IDMapping(fromUID: 2001, fromGID: 2002, toUID: 1000, toGID: 1000)
    #expect(try await box.output(probe, changing: bind(mapped)) == "1000\nwritten\n1\n")
    let file = try Descriptor.open(home + "/file", [.path]).status()
    #expect(file.uid == 2001 && file.gid == 2002)
    let unmapped = try await Box().output("(\(probe)) 2>/dev/null", changing: bind(nil))
    #expect(!unmapped.contains("written"), "control: without the map it is a stranger's")
  }

  @Test("a bind whose source is a symlink is refused") func symlinkSource() async throws {
    let box = try Box()
    try FileManager.default.createSymbolicLink(atPath: box.path + "/link", withDestinationPath: "/etc")
    var plan = try box.plan("ls /data")
    plan.operations.insert(
      .bind(source: box.path + "/link", target: "/data", options: BindOptions(change: MountChange(set: 6))),
      at: plan.operations.firstIndex { $0.name == "secrets" } ?? 0)
    guard case .failed(let failure)? = try await box.run(plan).record else {
      Issue.record("it was mounted")
      return
    }
    #expect(failure.errno == Errno.loop.code && failure.step.contains(box.path + "/link"))
  }

  @Test("/dev, /proc, /sys and /etc of an image may be no symlinks", arguments: ["dev", "proc", "sys", "etc"]) func rootLinks(name: String)
    async throws
  {
    let box = try Box()
    let canary = box.path + "/canary"
    try FileManager.default.createDirectory(atPath: canary, withIntermediateDirectories: true)
    try FileManager.default.removeItem(atPath: "\(box.path)/layer/\(name)")
    try FileManager.default.createSymbolicLink(atPath: "\(box.path)/layer/\(name)", withDestinationPath: canary)
    guard case .failed(let failure)? = try await box.run(try box.plan("true")).record else {
      Issue.record("it was followed")
      return
    }
    #expect(failure.step.contains("/\(name)") || failure.step.contains(name), "\(failure.step)")
    #expect(try FileManager.default.contentsOfDirectory(atPath: canary).isEmpty)
  }

  @Test("secrets: 0400, the user's, read-only, never swapped, and not in the environment") func secrets() async throws {
    let box = try Box()
    let probe = """
      stat -c '%a %u' /run/carrel/credentials/key; cat /run/carrel/credentials/key; echo
      (echo x > /run/carrel/credentials/new) 2>/dev/null || echo refused
      chmod 600 /run/carrel/credentials/key 2>/dev/null || echo refused
      grep ' /run/carrel/credentials ' /proc/self/mountinfo | grep -cE 'noswap|ramfs'; env | grep -c canary
      """
    let plan = try box.plan(probe)
    #expect(try await box.run(plan, secrets: ["key": "canary-7"]).output == "400 1000\ncanary-7\nrefused\nrefused\n1\n0\n")
    let everything = try FileManager.default.subpathsOfDirectory(atPath: box.path + "/sandbox").filter {
      !$0.hasSuffix(".log") && !$0.hasSuffix(".sock")
    }
    for name in everything {
      let data = FileManager.default.contents(atPath: box.path + "/sandbox/" + name) ?? Data()
      #expect(data.range(of: Data("canary-7".utf8)) == nil, "\(name) holds the secret")
    }
  }

  @Test("a secret is replaced while the program runs") func rotation() async throws {
    let box = try Box()
    let plan = try box.plan("f=/run/carrel/credentials/key; cat $f; while grep -q old $f; do sleep 0.02; done; cat $f")
    let result = try await box.run(plan, secrets: ["key": "old\n"]) { link, _ in
      try await Task.sleep(for: .milliseconds(200))
      try link.send(.putSecret(name: "key", content: Array("new\n".utf8)))
    }
    #expect(result.output == "old\nnew\n")
  }

  @Test("nothing of the host is open in PID 1 or in the program") func descriptors() async throws {
    let box = try Box()
    let result = try await box.run(try box.plan("ls /proc/self/fd | tr '\\n' ' '; ls /proc/1/fd 2>/dev/null | wc -l; sleep 0.3")) {
      _, pid in
      let kinds = try FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/fd")
        .map { try FileManager.default.destinationOfSymbolicLink(atPath: "/proc/\(pid)/fd/\($0)") }
      let strange = kinds.filter {
        !$0.hasPrefix("socket:") && !$0.hasPrefix("pipe:") && $0 != "/dev/null" && !$0.hasPrefix("anon_inode:[signalfd]")
      }
      // Descriptor 2 is the agent's own standard error, inherited for messages before the launch.
      #expect(strange.count <= 1, "\(strange)")
      #expect(strange.allSatisfy { !FileManager.default.fileExists(atPath: $0, isDirectory: nil) || !isDirectory($0) })
    }
    #expect(result.output == "0 1 2 3 0\n", "standard streams and ls's own; PID 1's are not to be seen")
  }

  private func isDirectory(_ path: String) -> Bool {
    var directory: ObjCBool = false
    return FileManager.default.fileExists(atPath: path, isDirectory: &directory) && directory.boolValue
  }

  @Test("a working directory outside the root is refused", arguments: ["/proc/self/fd/3", "/proc/self/fd/7", "/proc/1/root", "relative"])
  func directory(path: String) async throws {
    let box = try Box()
    guard case .failed(let failure)? = try await box.run(try box.plan("ls", directory: path)).record else {
      // A directory of its own root under another name is no way out.
      #expect(path == "/proc/1/root")
      return
    }
    #expect(failure.step.hasPrefix("enter directory"))
  }

  @Test("no core files") func cores() async throws {
    #expect(try await Box().output("ulimit -H -c") == "0\n")
    let hostLimit = try Process.limit(4).hard
    #expect(try await Box().output("ulimit -H -c") { $0.without("rlimit") } != "0\n" || hostLimit == 0, "control")
  }

  @Test("PID 1 reaps orphans") func reaping() async throws {
    let probe = "(sleep 0.05 & ) ; sleep 0.3; ps | grep -c '[Zz]ombie\\|\\[sleep\\]'"
    #expect(try await Box().output(probe) == "0\n")
  }

  @Test("signals reach the program, and its status is told apart", arguments: [(15, "exit 3"), (9, "none")]) func signals(
    number: Int32, trap: String
  ) async throws {
    let box = try Box()
    let plan = try box.plan(trap == "none" ? "exec sleep 10" : "trap '\(trap)' TERM; while true; do sleep 0.02; done")
    let result = try await box.run(plan) { link, _ in
      try await Task.sleep(for: .milliseconds(200))
      try link.send(.signal(number))
    }
    #expect(result.record == (trap == "none" ? .ended(.signalled(9)) : .ended(.exited(3))))
  }

  @Test(
    "programs that cannot be executed fail with their reason",
    arguments: [
      ("nosuch", Errno.noEntry, "execute"), ("/etc/text", .access, "execute"), ("/etc/garbage", .notExecutable, "execute"),
      ("/etc/script", .noEntry, "find the interpreter"),
    ])
  func notExecutable(program: String, error: Errno, step: String) async throws {
    let box = try Box()
    for (name, content, mode) in [("text", "x", 0o644), ("garbage", "\u{7f}ELFgarbage", 0o755), ("script", "#!/no/such\n", 0o755)] {
      _ = FileManager.default.createFile(
        atPath: "\(box.path)/layer/etc/\(name)", contents: Data(content.utf8), attributes: [.posixPermissions: mode])
    }
    var plan = try box.plan("")
    plan.operations.removeLast()
    plan.operations.append(.execute(arguments: [program], environment: ["PATH=/bin"], directory: "/"))
    guard case .failed(let failure)? = try await box.run(plan).record else {
      Issue.record("it ran")
      return
    }
    #expect(failure.errno == error.code && failure.step.hasPrefix(step), "\(failure)")
  }
}
