// swift-tools-version: 6.2
// SPDX-License-Identifier: Apache-2.0
//
// Everything that reads bytes from outside, under libFuzzer. A package of its own: all of it is compiled with coverage, and
// nothing that it does not need. `hack/fuzz` builds and runs it.

import PackageDescription

let settings: [SwiftSetting] = [
  .enableUpcomingFeature("ExistentialAny"), .enableUpcomingFeature("InternalImportsByDefault"),
  .enableUpcomingFeature("MemberImportVisibility"),
  .unsafeFlags(["-sanitize=fuzzer,address", "-parse-as-library"]),
]

func system(_ name: String, _ pkgConfig: String) -> Target {
  .systemLibrary(name: name, path: "Sources/System/\(name)", pkgConfig: pkgConfig)
}

let package = Package(
  name: "fuzz",
  targets: [
    .target(name: "CLinux"), system("CSeccomp", "libseccomp"), system("CJSON", "json-c"),
    .target(name: "Linux", dependencies: ["CLinux"], swiftSettings: settings),
    .target(name: "Cgroups", dependencies: ["Linux"], swiftSettings: settings),
    .target(name: "Procfs", dependencies: ["Linux"], swiftSettings: settings),
    .target(name: "Seccomp", dependencies: ["CSeccomp", "Linux"], swiftSettings: settings),
    .target(name: "LaunchPlan", dependencies: ["Linux"], swiftSettings: settings),
    .target(name: "ShimProtocol", dependencies: ["LaunchPlan", "Linux"], swiftSettings: settings),
    .target(name: "Executor", dependencies: ["LaunchPlan", "Linux", "ShimProtocol"], swiftSettings: settings),
    .target(name: "Broker", dependencies: ["Linux"], swiftSettings: settings),
    .target(name: "Shim", dependencies: ["Broker", "Executor", "LaunchPlan", "Linux", "ShimProtocol"], swiftSettings: settings),
    .target(
      name: "OCIRuntime", dependencies: ["CJSON", "Cgroups", "Executor", "LaunchPlan", "Linux", "Procfs", "Seccomp", "ShimProtocol"],
      swiftSettings: settings),
    .executableTarget(
      name: "Fuzz", dependencies: ["Broker", "Cgroups", "Executor", "LaunchPlan", "Linux", "OCIRuntime", "Procfs", "Shim", "ShimProtocol"],
      swiftSettings: settings, linkerSettings: [.unsafeFlags(["-sanitize=fuzzer,address", "-use-ld=lld"])]),
  ])
