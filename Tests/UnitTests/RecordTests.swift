// SPDX-License-Identifier: Apache-2.0

import Journal
import Testing

@testable import Agent
@testable import Workspaces

@Suite("Workspace records") struct WorkspaceRecordTests {
  @Test("records of an older agent, without fields added later, are read") func older() throws {
    let spec = WorkspaceSpec(id: "a", owner: .init(name: "ada", uid: 2001, gid: 2001), tool: "command", image: "i")
    let amounts = ResourceAmounts(memoryBytes: 1, milliCPUs: 1, pids: 1, shmBytes: 1, scratchBytes: 1)
    var record = WorkspaceRecord(spec: spec, amounts: amounts, slot: 3, address: "10.0.0.5", firstID: 1_048_576, created: "t")
    let written = try record.journalRecord()
    #expect(!written.body.contains("startedNanoseconds"))
    #expect(try WorkspaceRecord(written) == record)
    record.startedNanoseconds = 7
    #expect(try WorkspaceRecord(record.journalRecord()) == record)
  }
}
