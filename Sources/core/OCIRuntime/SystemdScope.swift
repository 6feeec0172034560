// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Cgroups
  internal import Linux
  internal import Executor
  internal import ShimProtocol
#endif

/// A transient systemd scope with a delegated cgroup (systemd.resource-control(5), `Delegate=`), in which the container has its own
/// cgroup. Only this runtime writes below the scope, so that a daemon-reload does not change the container's limits.
struct SystemdScope {
  let slice: String
  let name: String

  /// Parses `cgroupsPath` in the form `slice:prefix:name`, as runc and crun do; without one it is `system.slice:carrel:<id>`.
  init(_ asked: String, id: String) throws(RuntimeError) {
    func refusal(_ message: String) -> RuntimeError { RuntimeError("config.json: linux.cgroupsPath: \(message)") }
    let parts = (asked.isEmpty ? ":carrel:" + id : asked).split(separator: ":", omittingEmptySubsequences: false).map { String($0) }
    guard parts.count == 3, !parts[2].isEmpty else { throw refusal("\(asked): with --systemd-cgroup expected slice:prefix:name") }
    slice = parts[0].isEmpty ? "system.slice" : parts[0]
    name = (parts[1].isEmpty ? "" : parts[1] + "-") + parts[2] + ".scope"
    for part in [slice, name] where !SystemdScope.isUnitName(part) { throw refusal("\(part): not a unit name") }
    guard slice.utf8.count > 6, Array(slice.utf8.suffix(6)) == Array(".slice".utf8) else { throw refusal("\(slice): not a slice") }
  }

  /// Returns whether a text is a unit name (systemd.unit(5)).
  private static func isUnitName(_ text: String) -> Bool {
    text.utf8.count <= 255 && text.utf8.first != UInt8(ascii: ".")
      && text.utf8.allSatisfy { byte in
        (0x30...0x39).contains(byte) || (0x41...0x5A).contains(byte) || (0x61...0x7A).contains(byte)
          || [0x2D, 0x2E, 0x3A, 0x40, 0x5C, 0x5F].contains(byte)
      }
  }

  /// The container's cgroup, relative to the root of a hierarchy. The name of a slice contains its parents (systemd.slice(5)).
  var path: String {
    var path = ""
    var above = ""
    for part in slice.dropLast(6).split(separator: "-") {
      above += (above.isEmpty ? "" : "-") + part
      path += above + ".slice/"
    }
    return path + name + "/container"
  }

  /// The v1 hierarchies in which systemd creates no cgroups: the runtime must remove the scope and its slices there.
  static let unmanaged = ["freezer", "cpuset", "net_cls", "net_prio", "hugetlb", "perf_event", "rdma", "misc"]

  // ---------------------------------------------------------------- life cycle

  /// A process that keeps a scope alive while nothing else is in it.
  final class ScopeProcess {
    private let pid: Int32
    /// The pipe from which it reads; it exits at EOF.
    private let input: Pipe

    init(pid: Int32, input: Pipe) {
      self.pid = pid
      self.input = input
    }

    /// Moves the process to a cgroup where it does not prevent controllers from being enabled (cgroups(7), "no internal
    /// processes").
    func enter(_ cgroup: Cgroup) throws(RuntimeError) {
      do throws(CgroupError) { try cgroup.adopt(pid) } catch { throw RuntimeError(error.description) }
    }

    deinit {
      do throws(Errno) {
        try Process.kill(pid, Signals.kill)
        _ = try Process.reap(pid, wait: true)
      } catch {}
    }
  }

  /// Creates the scope by systemd-run(1), which calls systemd over its bus and then becomes cat(1) in the scope: output from cat
  /// means that the scope exists.
  func start() throws(RuntimeError) -> ScopeProcess {
    guard Process.exists("/run/systemd/system") else { throw RuntimeError("--systemd-cgroup: systemd does not run here") }
    let said: [UInt8]
    do throws(Errno) {
      let (input, output, errors) = (try Pipe(), try Pipe(), try Pipe())
      let holder = ScopeProcess(
        pid: try SystemdScope.spawn(
          [
            "systemd-run", "--scope", "--quiet", "--collect", "--unit=" + name, "--slice=" + slice, "--property=Delegate=yes",
            "--property=DefaultDependencies=no", "--description=carrel-runtime", "--", "cat",
          ], Program.Streams(input: input.reading, output: output.writing, errors: errors.writing)), input: input)
      output.closeWriting()
      errors.closeWriting()
      try input.writing?.descriptor.write([0x0A])
      if try !output.reading.descriptor.read(upTo: 1).isEmpty { return holder }
      said = try errors.reading.descriptor.readAll(limit: 65_536)
    } catch {
      throw RuntimeError("--systemd-cgroup: cannot use systemd-run: \(error.sentence)")
    }
    throw RuntimeError("--systemd-cgroup: \(name): \(String(decoding: said, as: UTF8.self))")
  }

  /// Stops the scope, so that its name is free again. A scope that does not exist is not an error.
  static func stop(_ name: String) {
    do throws(Errno) {
      let errors = try Pipe()
      let pid = try spawn(["systemctl", "stop", "--quiet", "--", name], Program.Streams(input: nil, output: nil, errors: errors.writing))
      errors.closeWriting()
      _ = try errors.reading.descriptor.readAll(limit: 65_536)
      _ = try Process.reap(pid, wait: true)
    } catch {}
  }

  private static func spawn(_ arguments: [String], _ streams: Program.Streams) throws(Errno) -> Int32 {
    let search = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    do throws(StepFailure) {
      return try Program(arguments: arguments, environment: [search], directory: "/").start(streams)
    } catch {
      throw Errno(error.errno)
    }
  }
}
