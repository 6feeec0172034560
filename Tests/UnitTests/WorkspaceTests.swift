// SPDX-License-Identifier: Apache-2.0

import Testing

@testable import Workspaces

private let brokenRules: [(@Sendable (inout WorkspaceSpec) -> Void, String)] = [
  ({ $0.id = String(repeating: "a", count: 300) }, "id"), ({ $0.owner.uid = 999 }, "owner.uid"), ({ $0.owner.gid = .max }, "owner.gid"),
  ({ $0.storage.home = "relative" }, "storage.home"), ({ $0.storage.home = "/a/../b" }, "storage.home"),
  ({ $0.storage.home = "/" }, "storage.home"),
  ({ $0.storage.datasets = [.init(source: "/a", target: "/proc/self", writable: false)] }, "storage.datasets[0].target"),
  (
    { $0.storage.datasets = [.init(source: "/a", target: "/d", writable: false), .init(source: "/b", target: "/d", writable: false)] },
    "storage.datasets[1].target"
  ),
  ({ $0.environment = ["A=B": "x"] }, "environment.A=B"), ({ $0.environment = ["A": "x\0"] }, "environment.A"),
  ({ $0.environment = ["AWS_SECRET_ACCESS_KEY": "x"] }, "environment.AWS_SECRET_ACCESS_KEY"),
  ({ $0.environment = ["A": String(repeating: "x", count: 300_000)] }, "environment"), ({ $0.labels = ["a\nb": "x"] }, "labels.a\\u{a}b"),
  ({ $0.credentials = ["../x"] }, "credentials[0].name"), ({ $0.credentials = ["token"] }, "credentials[0].name"),
  ({ $0.credentials = ["a", "a"] }, "credentials[1].name"), ({ $0.lifecycle.gracePeriodSeconds = 3601 }, "lifecycle.gracePeriodSeconds"),
  ({ $0.lifecycle.maxLifetimeSeconds = 0 }, "lifecycle.maxLifetimeSeconds"), ({ $0.command = [""] }, "command[0]"),
  ({ $0.command = ["a\0b"] }, "command[0]"),
]

private let brokenAmounts: [(@Sendable (inout WorkspaceSpec.Resources) -> Void, String)] = [
  ({ $0.memory = "0" }, "memory"), ({ $0.memory = "-1" }, "memory"), ({ $0.memory = "1Ki" }, "memory"), ({ $0.memory = "9Gi" }, "memory"),
  ({ $0.memory = "9223372036854775808" }, "memory"), ({ $0.cpu = "0" }, "cpu"), ({ $0.cpu = "3" }, "cpu"), ({ $0.cpu = "x" }, "cpu"),
  ({ $0.pids = "0" }, "pids"), ({ $0.pids = "1.5" }, "pids"), ({ $0.shm = "9Gi" }, "shm"), ({ $0.scratch = "1" }, "scratch"),
]

@Suite("Workspace specs") struct SpecTests {
  static let valid = """
    id: ada-lab
    owner: {name: ada, uid: 2001, gid: 2001}
    tool: jupyterlab
    image: jupyterlab
    """

  @Test("a spec is read whole") func whole() throws {
    let spec = try WorkspaceSpec(
      yaml: SpecTests.valid + """

        resources: {memory: 4Gi, cpu: 500m, pids: "100", shm: 64Mi, scratch: 1Gi}
        storage: {home: /srv/h, datasets: [{source: /d, target: /data/d, writable: true}]}
        credentials: [aws]
        environment: {A: "1"}
        labels: {team: x}
        lifecycle: {gracePeriodSeconds: 5, maxLifetimeSeconds: 60, restartPolicy: onFailure}
        network: none
        """)
    #expect(spec.storage.datasets == [.init(source: "/d", target: "/data/d", writable: true)])
    #expect(spec.lifecycle.restartPolicy == .onFailure)
    #expect(spec.network == WorkspaceSpec.NetworkPolicy.none)
    let amounts = try spec.amounts(
      defaults: .init(), policy: ResourcePolicy(hostMemoryBytes: 8 << 30, hostMilliCPUs: 2000))
    #expect(amounts == ResourceLimits(memoryBytes: 4 << 30, milliCPUs: 500, pids: 100, shmBytes: 64 << 20, scratchBytes: 1 << 30))
  }

  @Test(
    "wrong YAML names the field and the line",
    arguments: [
      ("tool: jupyterlab", "colour: red", "colour", 4), ("uid: 2001", "uid: 0", "owner.uid", 2), ("uid: 2001", "uid: -1", "owner.uid", 2),
      ("uid: 2001", "uid: 2147483648", "owner.uid", 2), ("uid: 2001", "uid: 4294967296", "owner.uid", 2),
      ("uid: 2001", "uid: 02001", "owner.uid", 2),
      ("uid: 2001", "uid: +2001", "owner.uid", 2), ("uid: 2001", "uid: 0x7d1", "owner.uid", 2), ("id: ada-lab", "id: ../x", "id", 1),
      ("id: ada-lab", "id: a/b", "id", 1), ("id: ada-lab", "id: -a", "id", 1), ("id: ada-lab", "id: 🦉", "id", 1),
      ("id: ada-lab", "id: \"a\\0b\"", "id", 1),
      ("id: ada-lab", "id: \"\"", "id", 1), ("image: jupyterlab", "image: ../../etc", "image", 4),
      ("tool: jupyterlab", "tool: [a]", "tool", 3),
    ])
  func wrong(from: String, to: String, path: String, line: Int) {
    let yaml =
      from == "tool: jupyterlab" && to.hasPrefix("colour")
      ? SpecTests.valid.replacing("image: jupyterlab", with: "colour: red\nimage: jupyterlab") : SpecTests.valid.replacing(from, with: to)
    #expect { try WorkspaceSpec(yaml: yaml) } throws: { error in
      guard let error = error as? InvalidField else { return false }
      return error.path == path && error.line == line
    }
  }

  @Test(
    "duplicate keys, other documents and 200 levels are refused",
    arguments: [
      SpecTests.valid + "\nid: other", "[]", "", "a: b: c", String(repeating: "[", count: 200), "id: [",
    ])
  func malformed(yaml: String) {
    #expect(throws: InvalidField.self) { try WorkspaceSpec(yaml: yaml) }
  }

  @Test("specs that break a rule name the field", arguments: brokenRules)
  func rules(change: @Sendable (inout WorkspaceSpec) -> Void, path: String) throws {
    var spec = try WorkspaceSpec(yaml: SpecTests.valid)
    try spec.validate()
    change(&spec)
    #expect { try spec.validate() } throws: { ($0 as? InvalidField)?.path == path }
  }

  @Test("amounts outside what the host has name the range", arguments: brokenAmounts)
  func amounts(change: @Sendable (inout WorkspaceSpec.Resources) -> Void, field: String) throws {
    var spec = try WorkspaceSpec(yaml: SpecTests.valid)
    change(&spec.resources)
    #expect { try spec.amounts(defaults: .init(), policy: ResourcePolicy(hostMemoryBytes: 8 << 30, hostMilliCPUs: 2000)) } throws: {
      ($0 as? InvalidField)?.path == "resources.\(field)"
    }
  }

  @Test("errors about credentials never hold their content") func credentialErrors() {
    let secret = "s3cr3t-canary"
    for credential in [
      Credential(name: "a", content: []), Credential(name: "a/b", content: Array(secret.utf8)),
      Credential(name: "a", content: Array(String(repeating: secret, count: 6000).utf8)),
    ] {
      #expect { try WorkspaceSpec.validate([credential]) } throws: { !"\($0)".contains(secret) }
      #expect(!"\(credential)".contains(secret))
    }
  }

  @Test(
    "quantities",
    arguments: [
      ("500m", 500), ("1", 1000), ("1.5", 1500), ("4Gi", (4 << 30) * 1000), ("0.001", 1), ("1k", 1_000_000), ("", nil), ("m", nil),
      ("1e3", nil), ("-1", nil),
      ("1.2345", nil), ("0.5m", nil), ("1GiB", nil), ("99999999999999999999", nil), (" 1", nil), ("١", nil),
    ] as [(String, Int?)])
  func quantities(text: String, thousandths: Int?) {
    #expect(Quantity.thousandths(text).map { Int($0) } == thousandths)
  }
}

@Suite("The state machine") struct StateMachineTests {
  static let inputs: [StateMachineInput] = [
    .preparationBegan, .launched, .becameReady, .stopRequested(by: "x"), .ended(Reason(.exited, "e")),
    .preparationFailed(Reason(.storage, "f")), .restartDecided, .supervisorLost,
  ]

  /// Every pair of state and input, with the state that follows; what is not here is illegal.
  static let legal: [WorkspaceState: [Int: WorkspaceState]] = [
    .pending: [0: .preparing, 3: .stopped, 5: .failed],
    .preparing: [1: .starting, 3: .stopping, 4: .stopped, 5: .failed, 7: .pending],
    .starting: [2: .ready, 3: .stopping, 4: .stopped, 5: .failed],
    .ready: [3: .stopping, 4: .stopped],
    .stopping: [4: .stopped, 5: .stopped],
    .stopped: [6: .pending],
    .failed: [6: .pending],
  ]

  @Test("allows what it should and nothing else", arguments: WorkspaceState.allCases) func exhaustive(state: WorkspaceState) {
    for (index, input) in StateMachineTests.inputs.enumerated() {
      let next = try? StateMachine.apply(input, to: state).state
      #expect(next == StateMachineTests.legal[state]?[index], "\(state) + \(input)")
    }
  }

  @Test("an end always has a reason") func reasons() throws {
    for state in WorkspaceState.allCases {
      for input in StateMachineTests.inputs {
        guard let next = try? StateMachine.apply(input, to: state), next.state.isTerminal else { continue }
        #expect(next.reason != nil, "\(state) + \(input)")
      }
    }
  }
}

@Suite("Tool definitions") struct ToolTests {
  @Test("placeholders are filled") func fill() {
    #expect(Tool.fill("a{port}b{port}", ["port": "80"]) == "a80b80")
    #expect(Tool.fill("{other}", ["port": "80"]) == "{other}")
  }

  @Test(
    "wrong definitions are refused",
    arguments: [
      "name: a", "name: a\nhome: x", "name: a\nhome: /h\nport: 0", "name: a\nhome: /h\nport: 70000",
      "name: a\nhome: /h\nreadiness: {path: /}", "name: a\nhome: /h\ntokenFile: ../x", "name: a\nhome: /h\nextra: 1",
      "name: a\nhome: /h\nenvironment: {JUPYTER_TOKEN: x}",
    ])
  func refused(yaml: String) { #expect(throws: InvalidField.self) { try Tool(yaml: yaml) } }
}
