// swift-tools-version: 6.2
// SPDX-License-Identifier: Apache-2.0

import Foundation
import PackageDescription

// Each target is a layer; an arrow never points up (CONTRIBUTING.md).

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
  .systemLibrary(name: name, path: "Sources/System/\(name)", pkgConfig: pkgConfig, providers: [.apt([package])])
}

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
  ],
  targets: [
    // C: one room for the kernel, one target for each system library.
    .target(name: "CLinux"),
    system("CSeccomp", "libseccomp", "libseccomp-dev"),
    system("CJSON", "json-c", "libjson-c-dev"),
    system("CCap", "libcap", "libcap-dev"),
    system("CSystemd", "libsystemd", "libsystemd-dev"),
    system("CArchive", "libarchive", "libarchive-dev"),
    system("CNftables", "libnftables", "libnftables-dev"),
    system("CCrypto", "libcrypto", "libssl-dev"),
    system("CNetlink", "libnl-route-3.0", "libnl-route-3-dev"),

    // The isolation core. `carrel-shim` and `carrel-runtime` compile the same folders once more,
    // as one module of Embedded Swift each (Sources/carrel-shim and its sibling hold links to them).
    .target(name: "Linux", dependencies: ["CLinux"], swiftSettings: strict),
    .target(name: "LaunchPlan", dependencies: ["CLinux", "Linux"], swiftSettings: strict),
    .target(name: "Sandbox", dependencies: ["CLinux", "Linux", "LaunchPlan"], swiftSettings: strict),
    .executableTarget(
      name: "carrel-shim", dependencies: ["CLinux"], swiftSettings: embedded, linkerSettings: embeddedLinking),

    // The same core behind the command line of OCI runtimes.
    .target(name: "Limits", dependencies: ["Linux"], swiftSettings: strict),
    .target(name: "Seccomp", dependencies: ["CSeccomp", "Linux"], swiftSettings: strict),
    .target(
      name: "OCI", dependencies: ["CJSON", "LaunchPlan", "Limits", "Linux", "Sandbox", "Seccomp"], swiftSettings: strict),
    .executableTarget(
      name: "carrel-runtime", dependencies: ["CJSON", "CLinux", "CSeccomp"], swiftSettings: embedded,
      linkerSettings: embeddedLinking),

    // The domain and its drivers.
    .target(name: "Isolation", dependencies: ["Linux", "LaunchPlan", "Seccomp"], swiftSettings: strict),
    .target(
      name: "Workspaces", dependencies: [.product(name: "Yams", package: "Yams")],
      swiftSettings: strict),
    .target(
      name: "Images", dependencies: ["CArchive", "CCrypto", "CLinux", "Linux"], swiftSettings: strict),
    .target(
      name: "Journal", dependencies: [.product(name: "GRDB", package: "GRDB.swift")],
      swiftSettings: strict),
    .target(name: "Concurrency", swiftSettings: strict),
    .target(name: "Storage", dependencies: ["Linux"], swiftSettings: strict),
    .target(name: "Credentials", swiftSettings: strict),
    // Not "Network": swift-nio asks canImport(Network) and means Apple's framework.
    .target(name: "Networking", dependencies: ["CNftables", "CNetlink", "CLinux", "Linux"], swiftSettings: strict),
    .target(
      name: "Supervision", dependencies: ["Concurrency", "Linux", "LaunchPlan", "Sandbox"],
      swiftSettings: strict),
    .target(
      name: "Agent",
      dependencies: [
        "CCap", "Concurrency", "Credentials", "Isolation", "Workspaces", "Images", "Journal", "Storage", "Networking", "Limits",
        "Supervision",
        "Linux", "LaunchPlan",
        .product(name: "Logging", package: "swift-log"),
        .product(name: "NIOCore", package: "swift-nio"),
        .product(name: "NIOPosix", package: "swift-nio"),
        .product(name: "Yams", package: "Yams"),
      ],
      swiftSettings: strict),
    .target(
      name: "API",
      dependencies: [
        .product(name: "GRPCCore", package: "grpc-swift-2"),
        .product(name: "GRPCProtobuf", package: "grpc-swift-protobuf"),
        .product(name: "SwiftProtobuf", package: "swift-protobuf"),
      ],
      swiftSettings: [.enableUpcomingFeature("InternalImportsByDefault")]),
    .target(
      name: "Services",
      dependencies: [
        "Agent", "API", "CLinux", "Concurrency", "Credentials", "Images", "Journal", "Linux", "Sandbox", "Storage", "Supervision",
        "Workspaces",
        .product(name: "GRPCCore", package: "grpc-swift-2"),
        .product(name: "GRPCNIOTransportHTTP2", package: "grpc-swift-nio-transport"),
        .product(name: "Logging", package: "swift-log"),
        .product(name: "NIOCore", package: "swift-nio"),
        .product(name: "NIOHPACK", package: "swift-nio-http2"),
        .product(name: "NIOHTTP2", package: "swift-nio-http2"),
        .product(name: "ServiceLifecycle", package: "swift-service-lifecycle"),
        .product(name: "SwiftProtobuf", package: "swift-protobuf"),
      ],
      swiftSettings: strict),
    .executableTarget(
      name: "carrel-controller",
      dependencies: [
        "API",
        .product(name: "ArgumentParser", package: "swift-argument-parser"),
        .product(name: "GRPCCore", package: "grpc-swift-2"),
        .product(name: "GRPCNIOTransportHTTP2", package: "grpc-swift-nio-transport"),
        .product(name: "SwiftProtobuf", package: "swift-protobuf"),
      ],
      swiftSettings: strict),
    .executableTarget(
      name: "carreld",
      dependencies: [
        "Agent", "CLinux", "CSystemd", "Linux", "Services", "Workspaces",
        .product(name: "ArgumentParser", package: "swift-argument-parser"),
        .product(name: "Logging", package: "swift-log"),
        .product(name: "ServiceLifecycle", package: "swift-service-lifecycle"),
        .product(name: "UnixSignals", package: "swift-service-lifecycle"),
      ],
      swiftSettings: strict),
    .executableTarget(
      name: "carrel",
      dependencies: [
        "API", "Linux",
        .product(name: "ArgumentParser", package: "swift-argument-parser"),
        .product(name: "GRPCCore", package: "grpc-swift-2"),
        .product(name: "GRPCNIOTransportHTTP2", package: "grpc-swift-nio-transport"),
        .product(name: "SwiftProtobuf", package: "swift-protobuf"),
        .product(name: "Yams", package: "Yams"),
      ],
      swiftSettings: strict),
    .testTarget(
      name: "UnitTests",
      dependencies: [
        "CLinux", "Agent", "Concurrency", "Credentials", "Images", "Isolation", "Journal", "LaunchPlan", "Limits", "Linux", "Networking",
        "OCI", "Sandbox", "Storage", "Supervision", "Workspaces",
        .product(name: "Logging", package: "swift-log"),
      ], swiftSettings: strict),
    .testTarget(
      name: "RootTests",
      dependencies: ["CLinux", "Images", "Isolation", "LaunchPlan", "Limits", "Linux", "Sandbox", "Storage", "Supervision"],
      swiftSettings: strict),
  ],
  swiftLanguageModes: [.v6]
)
