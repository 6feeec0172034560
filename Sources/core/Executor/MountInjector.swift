// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import ShimProtocol
  package import LaunchPlan
  internal import Linux
#endif

/// The one change that an injector makes in a sandbox.
package enum InjectorRequest: WireMessage {
  /// Mount the one `bind` of this plan.
  case attach(plan: [UInt8])
  /// Unmount the target if it is still this mount.
  case detach(target: String, mount: UInt64)
  /// Make the mount read-only or writable; the kernel refuses read-only with `busy` while files on it are open for writing.
  case change(target: String, mount: UInt64, readOnly: Bool)
  /// Return the id of the mount at the target.
  case find(target: String)
  /// The agent still waits for the change, so make it.
  case proceed

  package func encoded() -> [UInt8] {
    var writer = MessageWriter()
    switch self {
    case .attach(let plan):
      writer.code(1)
      writer.content(plan)
    case .detach(let target, let mount):
      writer.code(2)
      writer.text(target)
      writer.number(mount)
    case .change(let target, let mount, let readOnly):
      writer.code(3)
      writer.text(target)
      writer.number(mount)
      writer.flag(readOnly)
    case .find(let target):
      writer.code(4)
      writer.text(target)
    case .proceed: writer.code(5)
    }
    return writer.bytes
  }

  package init(decoding bytes: [UInt8]) throws(PlanError) {
    var reader = Reader(bytes)
    switch try reader.byte() {
    case 1: self = .attach(plan: try reader.counted())
    case 2: self = .detach(target: try reader.string(), mount: try reader.number(width: 8))
    case 3: self = .change(target: try reader.string(), mount: try reader.number(width: 8), readOnly: try reader.flag())
    case 4: self = .find(target: try reader.string())
    case 5: self = .proceed
    default: throw reader.error(.unknownOperation)
    }
    try reader.end()
  }
}

package enum InjectorReport: WireMessage {
  /// The sources on the host are open, and the injector waits for `proceed`.
  case ready
  /// The change is made; the id of the mount.
  case done(mount: UInt64)
  case failed(StepFailure)

  package func encoded() -> [UInt8] {
    var writer = MessageWriter()
    switch self {
    case .ready: writer.code(1)
    case .done(let mount):
      writer.code(2)
      writer.number(mount)
    case .failed(let failure):
      writer.code(3)
      writer.failure(failure)
    }
    return writer.bytes
  }

  package init(decoding bytes: [UInt8]) throws(PlanError) {
    var reader = Reader(bytes)
    switch try reader.byte() {
    case 1: self = .ready
    case 2: self = .done(mount: try reader.number(width: 8))
    case 3: self = .failed(try reader.failure())
    default: throw reader.error(.unknownOperation)
    }
    try reader.end()
  }
}

/// A short-lived process that the agent starts for one change of a sandbox's mounts, so that storage that hangs blocks only this
/// process. It opens and maps the sources outside, joins the sandbox's user and mount namespaces, makes one change there by
/// descriptors, and exits.
package struct MountInjector {
  /// The argument of `carrel-shim` that selects it.
  package static let name = "inject"

  private typealias Socket = MessageSocket<InjectorReport, InjectorRequest>

  /// Runs `carrel-shim inject`, with the agent's socket at descriptor 3 and the sandbox's user and mount namespaces at 4 and 5.
  package static func run() -> Never {
    Process.setName("carrel-inject")
    Signals.ignorePipe()
    let socket = Socket(Handle(Descriptor(adopting: 3)))
    let injector = MountInjector(user: Handle(Descriptor(adopting: 4)), mounts: Handle(Descriptor(adopting: 5)))
    do throws(Errno) {
      try Process.closeAll(from: 6, except: [])
      try Process.closeOnExec(from: 3)
      guard let request = try socket.receive()?.message else { Process.exit(0) }
      let report: InjectorReport
      do throws(StepFailure) {
        report = .done(
          mount: try injector.handle(request) { () throws(StepFailure) in
            // If the agent has given up, the change must not be made: it has already reported a failure.
            do throws(Errno) {
              try socket.send(.ready)
              guard case .proceed? = try socket.receive()?.message else { throw .noSuchProcess }
            } catch {
              throw StepFailure("wait for the agent", error)
            }
          })
      } catch {
        report = .failed(error)
      }
      try socket.send(report)
    } catch {
      Process.exit(1)
    }
    Process.exit(0)
  }

  private let user: Handle
  private let mounts: Handle

  private func handle(_ request: InjectorRequest, _ proceed: () throws(StepFailure) -> Void) throws(StepFailure) -> UInt64 {
    switch request {
    case .attach(let bytes):
      let plan: Plan
      do throws(PlanError) { plan = try Plan(decoding: bytes) } catch { throw StepFailure("decode the plan", .invalid) }
      guard plan.operations.count == 1, case .bind(_, let target, _)? = plan.operations.first else {
        throw StepFailure("decode the plan", .invalid)
      }
      let host = HostPart(plan)
      try host.prepare()
      try host.completeBinds()
      guard let mount = host.opened[0] else { throw StepFailure("decode the plan", .invalid) }
      try proceed()
      return try inside("mount at " + target) { (root) throws(Errno) in
        try Mount.attach(mount.descriptor, to: try root.openDirectory(making: target, resolving: MountInjector.walk))
        return try Mount.id(try MountInjector.open(target, in: root))
      }
    case .find(let target):
      return try inside("look at " + target) { (root) throws(Errno) in try Mount.id(try MountInjector.open(target, in: root)) }
    case .detach(let target, let id):
      return try inside("unmount " + target) { (root) throws(Errno) in
        try Mount.detach(try MountInjector.open(target, in: root, mount: id))
        return id
      }
    case .change(let target, let id, let readOnly):
      return try inside("change the mode of " + target) { (root) throws(Errno) in
        try Mount.setAttributes(
          try MountInjector.open(target, in: root, mount: id), readOnly ? [.readOnly] : [], clearing: readOnly ? [] : [.readOnly])
        return id
      }
    case .proceed: throw StepFailure("receive a request", .invalid)
    }
  }

  private static let walk: Resolution = [.inRoot, .noSymlinks]

  private static func open(_ target: String, in root: borrowing Descriptor) throws(Errno) -> Descriptor {
    try root.open(relative(target), [.path, .directory], resolving: walk)
  }

  /// Opens the target; throws `noEntry` if a different mount is there.
  private static func open(_ target: String, in root: borrowing Descriptor, mount id: UInt64) throws(Errno) -> Descriptor {
    let folder = try open(target, in: root)
    guard try Mount.id(folder) == id else { throw .noEntry }
    return folder
  }

  /// Runs `body` as the sandbox's root user, with the root directory of its mount namespace.
  private func inside(
    _ what: String, _ body: (borrowing Descriptor) throws(Errno) -> UInt64
  ) throws(StepFailure) -> UInt64 {
    do throws(Errno) {
      try Process.join(user.descriptor, .user)
      try Process.setIDs(uid: 0, gid: 0, groups: [])
      // This precedes joining the mounts: no process inside may trace this one.
      try Process.becomeUndumpable()
      try Process.join(mounts.descriptor, .mount)
      Process.setFileMask(0o022)
      return try body(try Descriptor.open("/", [.path, .directory]))
    } catch {
      throw StepFailure(what, error)
    }
  }
}
