// SPDX-License-Identifier: Apache-2.0

/// A value to write to one file of a cgroup.
package struct CgroupValue: Equatable, Sendable {
  /// The v1 controller whose hierarchy has the file; unused on v2.
  package let controller: String
  package let file: String
  package let text: String
  /// The value is skipped on kernels without the file.
  package var ifPresent = false
  /// The file can be read to see the value that the kernel stored.
  package var isReadBack = false

  package init(_ controller: String, _ file: String, _ text: String, ifPresent: Bool = false, isReadBack: Bool = false) {
    self.controller = controller
    self.file = file
    self.text = text
    self.ifPresent = ifPresent
    self.isReadBack = isReadBack
  }
}

/// Limits of a cgroup, in bytes and microseconds. A value that is nil does not change; −1 is "no limit" in the fields that say so,
/// as in the OCI runtime-spec (config-linux.md, "Control groups").
package struct Resources: Equatable, Sendable {
  /// −1: none.
  package var memory: Int64?
  /// The sum of memory and swap. −1: none.
  package var memoryAndSwap: Int64?
  /// The memory of TCP and UDP sockets, which v1 does not count as memory; v2 does.
  package var tcpMemory: Int64?
  package var memoryReservation: Int64?
  package var swappiness: UInt64?
  package var disablesOutOfMemoryKiller = false
  package var cpuShares: UInt64?
  /// −1: none.
  package var cpuQuota: Int64?
  package var cpuPeriod: UInt64?
  package var cpuBurst: UInt64?
  package var cpuIdle: Int64?
  package var cpus: String?
  package var memoryNodes: String?
  /// −1: none.
  package var pids: Int64?
  package var blockWeight: UInt64?
  /// Limits for each device ("major:minor"), in bytes or operations per second.
  package var blockThrottles: [BlockThrottle] = []
  /// The limit in bytes for each page size, which is written as in the kernel's file names, such as `2MB`.
  package var hugePages: [(size: String, limit: UInt64)] = []
  package var networkClass: UInt32?
  package var networkPriorities: [(interface: String, priority: UInt32)] = []
  /// A device and its limits, in the format of rdma.max.
  package var rdma: [String] = []
  /// "major:minor weight", with a weight from 10 to 1000.
  package var blockWeights: [String] = []
  /// Only cgroup v1 has this.
  package var realtimeRuntime: Int64?
  package var realtimePeriod: UInt64?
  /// Files of cgroup v2 and their content.
  package var unified: [(file: String, text: String)] = []

  package struct BlockThrottle: Equatable, Sendable {
    package enum Kind: Sendable { case readBytes, writeBytes, readOperations, writeOperations }
    package let kind: Kind
    package let device: String
    package let rate: UInt64
    package init(kind: Kind, device: String, rate: UInt64) {
      self.kind = kind
      self.device = device
      self.rate = rate
    }
  }

  package init() {}

  /// Makes the limits of a workspace: memory without swap, so that the memory limit is exact; a CPU quota; a number of processes.
  package init(memoryBytes: UInt64, milliCPUs: UInt64, pids: UInt64) {
    memory = Int64(clamping: memoryBytes)
    memoryAndSwap = memory
    tcpMemory = memory
    cpuPeriod = 100_000
    cpuQuota = Int64(clamping: max(milliCPUs * 100, 1000))
    self.pids = Int64(clamping: pids)
  }

  package static func == (a: Resources, b: Resources) -> Bool {
    a.values(.unified) == b.values(.unified) && a.values(.legacy) == b.values(.legacy)
  }

  /// The v1 controllers of the values.
  package var controllers: [String] {
    var found: [String] = []
    for value in values(.legacy) where !found.contains(value.controller) { found.append(value.controller) }
    return found
  }

  /// Returns a limit that this layout does not support, by its name in the runtime-spec.
  package func unsupported(_ layout: CgroupLayout) -> String? {
    if layout == .unified {
      if realtimeRuntime != nil || realtimePeriod != nil { return "cpu.realtimeRuntime (cgroup v2 has none)" }
      if disablesOutOfMemoryKiller { return "memory.disableOOMKiller (cgroup v2 has none)" }
      if networkClass != nil || !networkPriorities.isEmpty { return "network (cgroup v2 has neither classes nor priorities)" }
    } else if !unified.isEmpty {
      return "unified (this host's controllers are on cgroup v1)"
    }
    return nil
  }

  package func values(_ layout: CgroupLayout) -> [CgroupValue] { layout == .unified ? unifiedValues : legacyValues }

  private static func text(_ limit: Int64) -> String { limit < 0 ? "max" : "\(limit)" }

  private var unifiedValues: [CgroupValue] {
    var values: [CgroupValue] = []
    func add(_ file: String, _ text: String, ifPresent: Bool = false, isReadBack: Bool = false) {
      values.append(CgroupValue("", file, text, ifPresent: ifPresent, isReadBack: isReadBack))
    }
    if let memory {
      add("memory.max", Resources.text(memory), isReadBack: true)
      // The OOM killer then kills one process and not all: JupyterLab outlives its kernel.
      add("memory.oom.group", "0", ifPresent: true)
    }
    if let memoryAndSwap {
      // v2 counts swap separately.
      let swap = memoryAndSwap < 0 ? -1 : max(memoryAndSwap - max(memory ?? 0, 0), 0)
      add("memory.swap.max", Resources.text(swap), ifPresent: swap <= 0, isReadBack: true)
    }
    if let memoryReservation { add("memory.low", Resources.text(memoryReservation)) }
    if let cpuShares, cpuShares > 0 {
      // The usual conversion of 2…262144 to 1…10000.
      add("cpu.weight", "\(1 + (min(max(cpuShares, 2), 262_144) - 2) * 9999 / 262_142)")
    }
    if cpuQuota != nil || cpuPeriod != nil {
      let quota = cpuQuota ?? -1
      add("cpu.max", (quota <= 0 ? "max" : "\(quota)") + " \(cpuPeriod ?? 100_000)", isReadBack: true)
    }
    if let cpuBurst { add("cpu.max.burst", "\(cpuBurst)") }
    if let cpuIdle { add("cpu.idle", "\(cpuIdle)") }
    if let cpus { add("cpuset.cpus", cpus) }
    if let memoryNodes { add("cpuset.mems", memoryNodes) }
    if let pids { add("pids.max", pids <= 0 ? "max" : "\(pids)", isReadBack: true) }
    if let blockWeight, blockWeight > 0 {
      add("io.bfq.weight", "\(blockWeight)", ifPresent: true)
      add("io.weight", "default \(1 + (min(max(blockWeight, 10), 1000) - 10) * 9999 / 990)", ifPresent: true)
    }
    for throttle in blockThrottles {
      let key =
        switch throttle.kind {
        case .readBytes: "rbps"
        case .writeBytes: "wbps"
        case .readOperations: "riops"
        case .writeOperations: "wiops"
        }
      add("io.max", "\(throttle.device) \(key)=\(throttle.rate)")
    }
    for weight in blockWeights { add("io.bfq.weight", weight) }
    for page in hugePages { add("hugetlb.\(page.size).max", "\(page.limit)") }
    for device in rdma { add("rdma.max", device) }
    for entry in unified { add(entry.file, entry.text) }
    return values
  }

  private var legacyValues: [CgroupValue] {
    var values: [CgroupValue] = []
    func add(_ controller: String, _ file: String, _ text: String, ifPresent: Bool = false, isReadBack: Bool = false) {
      values.append(CgroupValue(controller, controller + "." + file, text, ifPresent: ifPresent, isReadBack: isReadBack))
    }
    // The memory limit must never exceed that of memory and swap. Removing the first therefore removes the second; to raise both in
    // a cgroup that has them already, the caller applies the values in reverse order.
    if memory == -1 && memoryAndSwap == nil { add("memory", "memsw.limit_in_bytes", "-1", ifPresent: true) }
    if let memory { add("memory", "limit_in_bytes", "\(memory)", isReadBack: memory >= 0) }
    if let memoryAndSwap {
      add("memory", "memsw.limit_in_bytes", "\(memoryAndSwap)", ifPresent: true, isReadBack: memoryAndSwap >= 0)
    }
    if let tcpMemory { add("memory", "kmem.tcp.limit_in_bytes", "\(tcpMemory)", ifPresent: true) }
    if let memoryReservation { add("memory", "soft_limit_in_bytes", "\(memoryReservation)") }
    if let swappiness { add("memory", "swappiness", "\(swappiness)") }
    if disablesOutOfMemoryKiller { add("memory", "oom_control", "1") }
    if let cpuShares, cpuShares > 0 { add("cpu", "shares", "\(cpuShares)") }
    if let cpuPeriod, cpuPeriod > 0 { add("cpu", "cfs_period_us", "\(cpuPeriod)", isReadBack: true) }
    if let cpuQuota, cpuQuota != 0 { add("cpu", "cfs_quota_us", "\(cpuQuota)", isReadBack: cpuQuota > 0) }
    if let realtimePeriod { add("cpu", "rt_period_us", "\(realtimePeriod)") }
    if let realtimeRuntime { add("cpu", "rt_runtime_us", "\(realtimeRuntime)") }
    if let cpuBurst { add("cpu", "cfs_burst_us", "\(cpuBurst)") }
    if let cpuIdle { add("cpu", "idle", "\(cpuIdle)") }
    if let cpus { add("cpuset", "cpus", cpus) }
    if let memoryNodes { add("cpuset", "mems", memoryNodes) }
    if let pids { add("pids", "max", pids <= 0 ? "max" : "\(pids)", isReadBack: true) }
    if let blockWeight, blockWeight > 0 {
      add("blkio", "weight", "\(blockWeight)", ifPresent: true)
      add("blkio", "bfq.weight", "\(blockWeight)", ifPresent: true)
    }
    for throttle in blockThrottles {
      let file =
        switch throttle.kind {
        case .readBytes: "read_bps_device"
        case .writeBytes: "write_bps_device"
        case .readOperations: "read_iops_device"
        case .writeOperations: "write_iops_device"
        }
      add("blkio", "throttle.\(file)", "\(throttle.device) \(throttle.rate)")
    }
    for weight in blockWeights {
      add("blkio", "weight_device", weight, ifPresent: true)
      add("blkio", "bfq.weight_device", weight, ifPresent: true)
    }
    for page in hugePages { add("hugetlb", "\(page.size).limit_in_bytes", "\(page.limit)") }
    for device in rdma { add("rdma", "max", device) }
    if let networkClass { add("net_cls", "classid", "\(networkClass)") }
    for entry in networkPriorities { add("net_prio", "ifpriomap", "\(entry.interface) \(entry.priority)") }
    return values
  }
}
