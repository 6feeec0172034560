// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Linux
#endif

/// The output of `features` (runtime-spec, features.md).
package enum Features {
  package static let specificationVersion = "1.2.0"

  package static var text: String {
    func list(_ texts: [String]) -> JSONText { .array(texts.map { .string($0) }) }
    let mountOptions = [
      "async", "atime", "bind", "dev", "diratime", "exec", "idmap", "noatime", "nodev", "nodiratime", "noexec", "norelatime",
      "nostrictatime", "nosuid", "nosymfollow", "private", "ratime", "rbind", "rdev", "rdiratime", "relatime", "rexec", "ridmap",
      "rnoatime",
      "rnodev",
      "rnodiratime", "rnoexec", "rnorelatime", "rnostrictatime", "rnosuid", "rnosymfollow", "ro", "rprivate", "rrelatime", "rro", "rrw",
      "rshared", "rslave", "rstrictatime", "rsuid", "rsymfollow", "runbindable", "rw", "shared", "slave", "strictatime", "suid",
      "symfollow",
      "tmpcopyup", "unbindable",
    ]
    let seccomp: [(key: String, value: JSONText)] = [
      ("enabled", .bool(true)),
      (
        "actions",
        list([
          "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG",
          "SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
        ])
      ),
      (
        "operators",
        list(["SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"])
      ),
      (
        "knownFlags",
        list([
          "SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
          "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
        ])
      ),
    ]
    let linux: [(key: String, value: JSONText)] = [
      ("namespaces", list(NamespaceSet.kinds.map { $0.name })),
      ("capabilities", list(Capabilities.names.map { "CAP_" + $0 })),
      (
        "cgroup",
        .object([
          ("v1", .bool(true)), ("v2", .bool(true)), ("systemd", .bool(true)), ("systemdUser", .bool(false)), ("rdma", .bool(true)),
        ])
      ),
      ("seccomp", .object(seccomp)),
      ("apparmor", .object([("enabled", .bool(true))])), ("selinux", .object([("enabled", .bool(true))])),
      ("intelRdt", .object([("enabled", .bool(false))])),
      ("mountExtensions", .object([("idmap", .object([("enabled", .bool(true))]))])),
    ]
    return JSONText.object([
      ("ociVersionMin", .string("1.0.0")), ("ociVersionMax", .string(specificationVersion)),
      ("hooks", list(["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"])),
      ("mountOptions", list(mountOptions)), ("linux", .object(linux)),
    ]).encoded
  }
}

/// The configuration that `spec` writes: an isolated shell.
package enum ExampleConfiguration {
  package static func write(to folder: String) throws(RuntimeError) {
    do throws(Errno) {
      let file = try Descriptor.open(folder, [.path, .directory]).open(
        "config.json", [.writeOnly, .create, .exclusive, .noFollow], mode: 0o644)
      try file.write(Array(text.utf8))
    } catch {
      throw RuntimeError("\(folder)/config.json: \(error.sentence)")
    }
  }

  private static let text = """
    {
      "ociVersion": "1.2.0",
      "process": {
        "terminal": true,
        "user": { "uid": 0, "gid": 0 },
        "args": ["sh"],
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
        "cwd": "/",
        "capabilities": {
          "bounding": ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"],
          "effective": ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"],
          "permitted": ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
        },
        "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
        "noNewPrivileges": true
      },
      "root": { "path": "rootfs", "readonly": true },
      "hostname": "carrel",
      "mounts": [
        { "destination": "/proc", "type": "proc", "source": "proc" },
        { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
        { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
          "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
        { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
        { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] },
        { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
        { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] }
      ],
      "linux": {
        "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
        "namespaces": [
          { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" }
        ],
        "maskedPaths": [
          "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
          "/proc/sched_debug", "/proc/scsi", "/sys/firmware"
        ],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
      }
    }

    """
}
