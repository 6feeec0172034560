// SPDX-License-Identifier: Apache-2.0

#if DEBUG
  internal import CLinux
#endif

/// Named points at which a debug build kills itself as if by `kill -9`: `CARREL_FAULT=NAME` the first time it reaches the point,
/// `NAME:3` the third time. A release build has none.
///
/// Tests/Faults reads the names from this file and reaches each of them.
package enum Fault: String {
  // The agent: before and after the commits, named by the type of their event.
  case beforeCreated = "before Created"
  case afterCreated = "after Created"
  case beforePreparing = "before Preparing"
  case afterPreparing = "after Preparing"
  case beforeStarting = "before Starting"
  case afterStarting = "after Starting"
  case beforeReady = "before Ready"
  case afterReady = "after Ready"
  case beforeStopping = "before Stopping"
  case afterStopping = "after Stopping"
  case beforeStopped = "before Stopped"
  case afterStopped = "after Stopped"
  case beforeFailed = "before Failed"
  case afterFailed = "after Failed"
  case beforeRestarting = "before Restarting"
  case afterRestarting = "after Restarting"
  case beforeDeleted = "before Deleted"
  case afterDeleted = "after Deleted"
  case beforeDrainBegan = "before DrainBegan"
  case afterDrainBegan = "after DrainBegan"
  // The agent: after its effects on the host.
  case limited = "limits set"
  case spawned = "supervisor spawned"
  case entrusted = "secrets handed over"
  case connected = "network connected"
  case released = "start sent"
  case exitSeen = "exit seen"
  case cleaning = "cleaning"
  case cleaned = "cleaned"
  case folderRemoved = "folder removed"
  case datasetMounted = "dataset mounted"
  case datasetUnmounted = "dataset unmounted"
  case beforeDatasetAttached = "before DatasetAttached"
  case afterDatasetAttached = "after DatasetAttached"
  case beforeDatasetDetached = "before DatasetDetached"
  case afterDatasetDetached = "after DatasetDetached"
  case acknowledged = "acknowledged"
  case trimmed = "trimmed"
  // The supervisor.
  case prepared = "supervisor prepared"
  case cloned = "supervisor cloned"
  case beforeRecord = "supervisor before record"
  case afterRecord = "supervisor after record"

  #if DEBUG
    package static func at(_ point: Fault) { point.rawValue.withCString { clx_fault($0) } }
    package static func at(_ name: String) { if let point = Fault(rawValue: name) { at(point) } }
    /// The environment variables that give a child process the same faults.
    package static var environment: [String] {
      ["CARREL_FAULT", "CARREL_FAULT_LOG"].compactMap { name in clx_environment(name).map { name + "=" + String(cString: $0) } }
    }
  #else
    @inline(__always) package static func at(_ point: Fault) {}
    @inline(__always) package static func at(_ name: @autoclosure () -> String) {}
    package static var environment: [String] { [] }
  #endif
}
