// swift-tools-version: 6.2
// SPDX-License-Identifier: Apache-2.0

import Foundation
import PackageDescription

// Folders group targets by layer: kernel, core, domain, drivers, node, frontends, programs. An arrow never points up (CONTRIBUTING.md).

let strict: [SwiftSetting] = [
  .enableUpcomingFeature("ExistentialAny"),
  .enableUpcomingFeature("InternalImportsByDefault"),
  .enableUpcomingFeature("MemberImportVisibility"),
  .treatAllWarnings(as: .error),
]

// Embedded Swift for the helper: as small and as fast as C. `-no-static-stdlib`
// is needed because SwiftPM would otherwise pass `-static-stdlib`.
let embedded: [SwiftSetting] = [
  .enableExperimentalFeature("Embedded"),
  .unsafeFlags(["-wmo", "-Osize", "-no-static-stdlib"]),
]

/// The toolchain's folder for the embedded Unicode tables, found beside the running compiler.
let embeddedLibraries: String = {
  let searched = (ProcessInfo.processInfo.environment["PATH"] ?? "").split(separator: ":").map(String.init)
  for folder in searched {
    let compiler = URL(fileURLWithPath: folder).appendingPathComponent("swiftc")
    guard FileManager.default.isExecutableFile(atPath: compiler.path) else { continue }
    let usr = compiler.resolvingSymlinksInPath().deletingLastPathComponent().deletingLastPathComponent()
    let library = usr.appendingPathComponent("lib/swift/embedded/x86_64-unknown-linux-gnu")
    if FileManager.default.fileExists(atPath: library.path) { return library.path }
  }
  return "/usr/lib/swift/embedded/x86_64-unknown-linux-gnu"
}()

let embeddedLinking: [LinkerSetting] = [
  .unsafeFlags(["-no-static-stdlib", "-Xclang-linker", "-static", "-L\(embeddedLibraries)"]),
  .linkedLibrary("swiftUnicodeDataTables"), .linkedLibrary("m"),
]

func system(_ name: String, _ pkgConfig: String, _ package: String) -> Target {
  .systemLibrary(name: name, path: "Sources/kernel/System/\(name)", pkgConfig: pkgConfig, providers: [.apt([package])])
}

/// A library target in the folder of its layer.
func library(_ layer: String, _ name: String, _ dependencies: [Target.Dependency] = []) -> Target {
  .target(name: name, dependencies: dependencies, path: "Sources/\(layer)/\(name)", swiftSettings: strict)
}

func program(_ name: String, _ dependencies: [Target.Dependency]) -> Target {
  .executableTarget(name: name, dependencies: dependencies, path: "Sources/programs/\(name)", swiftSettings: strict)
}

/// A static program: one module of Embedded Swift, made of the folders that its own holds links to.
func staticProgram(_ name: String, _ dependencies: [Target.Dependency]) -> Target {
  .executableTarget(
    name: name, dependencies: dependencies, path: "Sources/programs/\(name)", swiftSettings: embedded, linkerSettings: embeddedLinking)
}

let argumentParser = Target.Dependency.product(name: "ArgumentParser", package: "swift-argument-parser")
let grpcCore = Target.Dependency.product(name: "GRPCCore", package: "grpc-swift-2")
let grpcTransport = Target.Dependency.product(name: "GRPCNIOTransportHTTP2", package: "grpc-swift-nio-transport")
let logging = Target.Dependency.product(name: "Logging", package: "swift-log")
let nioCore = Target.Dependency.product(name: "NIOCore", package: "swift-nio")
let protobuf = Target.Dependency.product(name: "SwiftProtobuf", package: "swift-protobuf")
let serviceLifecycle = Target.Dependency.product(name: "ServiceLifecycle", package: "swift-service-lifecycle")
let yams = Target.Dependency.product(name: "Yams", package: "Yams")

let package = Package(
  name: "carrel",
  products: [
    .executable(name: "carreld", targets: ["carreld"]),
    .executable(name: "carrel", targets: ["carrel"]),
    .executable(name: "carrel-shim", targets: ["carrel-shim"]),
    .executable(name: "carrel-runtime", targets: ["carrel-runtime"]),
    .executable(name: "carrel-controller", targets: ["carrel-controller"]),
  ],
  dependencies: [
    .package(url: "https://github.com/grpc/grpc-swift-2", exact: "2.4.3"),
    .package(url: "https://github.com/grpc/grpc-swift-nio-transport", exact: "2.9.2"),
    .package(url: "https://github.com/grpc/grpc-swift-protobuf", exact: "2.4.1"),
    .package(url: "https://github.com/apple/swift-protobuf", exact: "1.39.0", traits: []),
    .package(url: "https://github.com/apple/swift-nio", exact: "2.101.2"),
    .package(url: "https://github.com/apple/swift-nio-http2", exact: "1.46.0"),
    .package(url: "https://github.com/groue/GRDB.swift", exact: "7.10.0"),
    .package(url: "https://github.com/apple/swift-log", exact: "1.16.2"),
    .package(url: "https://github.com/swift-server/swift-service-lifecycle", exact: "2.13.0"),
    .package(url: "https://github.com/apple/swift-argument-parser", exact: "1.8.2"),
    .package(url: "https://github.com/jpsim/Yams", exact: "6.2.2"),
    // What those depend on. `hack/test` compares this list with what was resolved; Package.resolved is not kept, for its commit ids
    // differ between mirrors.
    .package(url: "https://github.com/apple/swift-algorithms.git", exact: "1.2.1"),
    .package(url: "https://github.com/apple/swift-asn1.git", exact: "1.7.4"),
    .package(url: "https://github.com/apple/swift-async-algorithms.git", exact: "1.1.4"),
    .package(url: "https://github.com/apple/swift-atomics.git", exact: "1.3.0"),
    .package(url: "https://github.com/apple/swift-certificates.git", exact: "1.21.1"),
    .package(url: "https://github.com/apple/swift-collections.git", exact: "1.6.0"),
    .package(url: "https://github.com/apple/swift-crypto.git", exact: "4.5.2"),
    .package(url: "https://github.com/apple/swift-http-structured-headers.git", exact: "1.7.0"),
    .package(url: "https://github.com/apple/swift-http-types.git", exact: "1.8.0"),
    .package(url: "https://github.com/apple/swift-nio-extras.git", exact: "1.35.2"),
    .package(url: "https://github.com/apple/swift-nio-ssl.git", exact: "2.37.6"),
    .package(url: "https://github.com/apple/swift-nio-transport-services.git", exact: "1.28.0"),
    .package(url: "https://github.com/apple/swift-numerics.git", exact: "1.1.1"),
    .package(url: "https://github.com/apple/swift-system.git", exact: "1.8.1"),
  ],
  targets: [
    // The kernel: all C, one target for each system library, and typed calls.
    .target(name: "CLinux", path: "Sources/kernel/CLinux"),
    system("CSeccomp", "libseccomp", "libseccomp-dev"),
    system("CJSON", "json-c", "libjson-c-dev"),
    system("CCap", "libcap", "libcap-dev"),
    system("CSystemd", "libsystemd", "libsystemd-dev"),
    system("CArchive", "libarchive", "libarchive-dev"),
    system("CNftables", "libnftables", "libnftables-dev"),
    system("CCrypto", "libcrypto", "libssl-dev"),
    system("CNetlink", "libnl-route-3.0", "libnl-route-3-dev"),
    library("kernel", "Linux", ["CLinux"]),
    library("kernel", "Procfs", ["Linux"]),
    library("kernel", "Cgroups", ["Linux"]),
    library("kernel", "Seccomp", ["CSeccomp", "Linux"]),

    // The core, which the static programs compile once more.
    library("core", "LaunchPlan", ["Linux"]),
    library("core", "ShimProtocol", ["LaunchPlan", "Linux"]),
    library("core", "Executor", ["LaunchPlan", "Linux", "ShimProtocol"]),
    library("core", "Broker", ["Linux"]),
    library("core", "Shim", ["Broker", "Executor", "LaunchPlan", "Linux", "ShimProtocol"]),
    library("core", "OCIRuntime", ["CJSON", "Cgroups", "Executor", "LaunchPlan", "Linux", "Procfs", "Seccomp", "ShimProtocol"]),

    // The domain: values in, decisions out.
    library("domain", "Workspaces", [yams]),
    library("domain", "Isolation", ["LaunchPlan", "Linux", "Seccomp"]),
    library("domain", "Configuration", ["Workspaces"]),

    // Drivers, one resource each; none knows another.
    library("drivers", "Errors", ["Linux"]),
    library("drivers", "Concurrency"),
    library("drivers", "HostPrograms", ["Errors", "Linux"]),
    library("drivers", "Journal", [.product(name: "GRDB", package: "GRDB.swift")]),
    library("drivers", "Images", ["CArchive", "CCrypto", "Errors", "Linux", "Workspaces"]),
    library("drivers", "Volumes", ["Errors", "HostPrograms", "Linux", "Procfs"]),
    library("drivers", "Credentials", ["Configuration", "Errors", "HostPrograms"]),
    // Not "Network": swift-nio asks canImport(Network) and means Apple's framework.
    library("drivers", "Networking", ["CNftables", "CNetlink", "Configuration", "Errors", "Linux", "Procfs"]),
    library("drivers", "ShimClient", ["Concurrency", "Executor", "LaunchPlan", "Linux", "Shim", "ShimProtocol"]),

    // The only place that knows several drivers.
    .target(
      name: "Agent",
      dependencies: [
        "CCap", "Broker", "Cgroups", "Concurrency", "Configuration", "Credentials", "Errors", "Executor", "Images",
        "Isolation", "Journal", "LaunchPlan", "Linux", "Networking", "Procfs", "Shim", "ShimClient", "ShimProtocol", "Volumes",
        "Workspaces", logging, nioCore,
        .product(name: "NIOPosix", package: "swift-nio"), yams,
      ],
      path: "Sources/node", swiftSettings: strict),

    // Wire formats; none knows another.
    .target(
      name: "API", dependencies: [grpcCore, .product(name: "GRPCProtobuf", package: "grpc-swift-protobuf"), protobuf],
      path: "Sources/frontends/API", swiftSettings: [.enableUpcomingFeature("InternalImportsByDefault")]),
    library(
      "frontends", "WireMapping",
      [
        "API", "Agent", "Concurrency", "Errors", "Images", "Journal", "Volumes", "Workspaces", grpcCore,
        .product(name: "GRPCProtobuf", package: "grpc-swift-protobuf"), logging, protobuf,
      ]),
    library(
      "frontends", "GRPC",
      [
        "API", "Agent", "Concurrency", "Configuration", "Images", "Journal", "Linux", "ShimClient", "Volumes", "WireMapping", "Workspaces",
        grpcCore, grpcTransport, logging, nioCore, .product(name: "NIOHPACK", package: "swift-nio-http2"),
        .product(name: "NIOHTTP2", package: "swift-nio-http2"), protobuf, serviceLifecycle,
      ]),
    library(
      "frontends", "ControllerClient",
      [
        "API", "Agent", "Concurrency", "Configuration", "Credentials", "Journal", "Linux", "WireMapping", "Workspaces", grpcCore,
        grpcTransport, logging, protobuf, serviceLifecycle,
      ]),

    // Entry points.
    staticProgram("carrel-shim", ["CLinux"]),
    staticProgram("carrel-runtime", ["CJSON", "CLinux", "CSeccomp"]),
    program("carrel-controller", ["API", argumentParser, grpcCore, grpcTransport, protobuf]),
    program(
      "carreld",
      [
        "Agent", "CSystemd", "Configuration", "ControllerClient", "GRPC", "Linux", "Workspaces", argumentParser, logging, serviceLifecycle,
        .product(name: "UnixSignals", package: "swift-service-lifecycle"),
      ]),
    program("carrel", ["API", "Linux", "Workspaces", argumentParser, grpcCore, grpcTransport, protobuf, yams]),

    .testTarget(
      name: "UnitTests",
      dependencies: [
        "API", "Agent", "Broker", "CLinux", "Cgroups", "Concurrency", "Configuration", "Credentials", "Errors", "Executor", "Images",
        "Isolation", "Journal", "LaunchPlan", "Linux", "Networking", "OCIRuntime", "Procfs", "Shim", "ShimClient", "ShimProtocol",
        "Volumes",
        "WireMapping", "Workspaces", grpcCore, .product(name: "GRPCProtobuf", package: "grpc-swift-protobuf"), logging, protobuf,
      ], swiftSettings: strict),
    .testTarget(
      name: "RootTests",
      dependencies: [
        "CLinux", "Cgroups", "Errors", "Executor", "Images", "Isolation", "LaunchPlan", "Linux", "Shim", "ShimClient", "ShimProtocol",
        "Volumes",
      ], swiftSettings: strict),
  ],
  swiftLanguageModes: [.v6]
)
