// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// BPF programs of cgroups.
package enum Filter {
  /// Loads a program of type cgroup-device and attaches it in addition to those already attached (BPF_F_ALLOW_MULTI).
  package static func attachDeviceProgram(_ program: [UInt64], to cgroup: borrowing Descriptor) throws(Errno) {
    let loaded = Descriptor(
      adopting: Int32(try check(program.withUnsafeBytes { clx_bpf_load_device($0.baseAddress, UInt32(program.count)) })))
    try check(clx_bpf_attach_device(loaded.number, cgroup.number))
  }
}
