// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import LaunchPlan
  internal import Linux
#endif

/// Changes what is mounted in a workspace that runs. What comes from the host is opened and mapped outside; a process that joins
/// the workspace's user and mount namespaces then does one thing there, by descriptors, and ends.
struct Injection {
  /// The workspace's PID 1 as the host numbers it, a child of this process: nobody else can have its number.
  let pid: Int32

  /// Mounts `bind`, which has an absent or empty folder for a target, and returns the mount's number.
  func attach(_ bind: Operation) throws(Errno) -> UInt64 {
    guard case .bind(_, let target, _) = bind else { throw .invalid }
    let host = HostPart(Plan([bind]))
    do throws(StepFailure) {
      try host.prepare()
      try host.completeBinds()
    } catch {
      throw Errno(error.errno)
    }
    guard let mount = host.opened[0] else { throw .invalid }
    return try inside { (root) throws(Errno) in
      try Mount.attach(mount.descriptor, to: try Injection.folder(target, in: root))
      return try Mount.id(try Injection.open(target, in: root))
    }
  }

  /// The number of what is mounted at the target.
  func find(_ target: String) throws(Errno) -> UInt64 {
    try inside { (root) throws(Errno) in try Mount.id(try Injection.open(target, in: root)) }
  }

  /// Only if it is still that mount.
  func detach(_ target: String, _ id: UInt64) throws(Errno) {
    _ = try inside { (root) throws(Errno) in
      let folder = try Injection.open(target, in: root)
      guard try Mount.id(folder) == id else { throw .noEntry }
      try Mount.detach(folder)
      return 0
    }
  }

  /// `busy` where files are open for writing and it is to be read-only.
  func change(_ target: String, _ id: UInt64, readOnly: Bool) throws(Errno) {
    _ = try inside { (root) throws(Errno) in
      let folder = try Injection.open(target, in: root)
      guard try Mount.id(folder) == id else { throw .noEntry }
      try Mount.setAttributes(folder, readOnly ? [.readOnly] : [], clearing: readOnly ? [] : [.readOnly])
      return 0
    }
  }

  private static let walk: Resolution = [.inRoot, .noSymlinks]

  private static func open(_ target: String, in root: borrowing Descriptor) throws(Errno) -> Descriptor {
    try root.open(relative(target), [.path, .directory], resolving: walk)
  }

  /// Makes what is missing of the way there.
  private static func folder(_ target: String, in root: borrowing Descriptor) throws(Errno) -> Descriptor {
    var path = ""
    for part in target.split(separator: "/") {
      let above = path.isEmpty ? "." : path
      path += (path.isEmpty ? "" : "/") + part
      do throws(Errno) {
        _ = try root.open(path, [.path, .directory], resolving: walk)
      } catch {
        guard error == .noEntry else { throw error }
        try root.open(above, [.path, .directory], resolving: walk).makeDirectory(String(part), mode: 0o755)
      }
    }
    return try open(target, in: root)
  }

  /// Runs `body` as root of the workspace, with the root of what is mounted there.
  private func inside(_ body: (borrowing Descriptor) throws(Errno) -> UInt64) throws(Errno) -> UInt64 {
    let user = try Descriptor.open("/proc/\(pid)/ns/user", [.readOnly])
    let mounts = try Descriptor.open("/proc/\(pid)/ns/mnt", [.readOnly])
    let pipe = try Pipe()
    let visitor = try Process.fork()
    if visitor == 0 {
      var report: Int64
      do throws(Errno) {
        try Process.join(user, .user)
        try Process.setIDs(uid: 0, gid: 0, groups: [])
        try Process.becomeUndumpable()
        try Process.join(mounts, .mount)
        Process.setFileMask(0o022)
        report = Int64(bitPattern: try body(try Descriptor.open("/", [.path, .directory])))
      } catch {
        report = -Int64(error.code)
      }
      var bytes: [UInt8] = []
      bytes.append(number: UInt64(bitPattern: report), width: 8)
      do throws(Errno) { try pipe.writing?.descriptor.write(bytes) } catch {}
      Process.exit(0)
    }
    pipe.closeWriting()
    let bytes = try pipe.reading.descriptor.read(upTo: 8)
    _ = try Process.reap(visitor, wait: true)
    var reader = Reader(bytes)
    let report: Int64
    do throws(PlanError) { report = Int64(bitPattern: try reader.number(width: 8)) } catch { throw .noChild }
    if report < 0 { throw Errno(Int32(clamping: -report)) }
    return UInt64(report)
  }
}
