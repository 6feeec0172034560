// SPDX-License-Identifier: Apache-2.0
//
// As git-credential-carrel, inside a workspace: git's credential helper.
//
// carrel-shim ID: the supervisor of one workspace. Started by carreld with the workspace's directory at
// descriptor 3, the socket to listen on at 4 and its first connection at 5. It waits there for the word that the
// launch plan is in the file `plan`, and ends where whoever started it has gone before that.

if let first = Process.arguments.first, first.split(separator: "/").last.map({ String($0) }) == GitHelper.name {
  Process.exit(
    GitHelper.run(
      Array(Process.arguments.dropFirst()), input: Descriptor(adopting: 0),
      tokenFile: "/run/carrel/credentials/" + CredentialBroker.tokenName))
}
runSupervisor()

func runSupervisor() {
  Process.setName("carrel-shim")
  Signals.ignorePipe()
  let folder = Handle(Descriptor(adopting: 3))
  do throws(Errno) {
    // What another thread of the agent had open at that moment, such as the pipe of a program that it waits for, is not ours to keep.
    try Process.closeAll(from: 6, except: [])
    try Process.closeOnExec(from: 3)
    try Signals.blockAll()
    // Listening again makes this process the one that a peer's SO_PEERCRED names.
    try Socket.relisten(4)
    let agent = MessageSocket(Handle(Descriptor(adopting: 5)))
    guard case .launch? = try agent.receive()?.message else { return }
    let file = try folder.descriptor.open("plan", [.readOnly, .noFollow])
    let bytes = try file.readAll(limit: Plan.sizeLimit)
    let logs = Handle(try folder.descriptor.open("log", [.readOnly, .directory]))
    do throws(PlanError) {
      let plan = try Plan(decoding: bytes)
      Supervisor(
        folder: folder, listener: Handle(Descriptor(adopting: 4)), agent: agent, logs: logs, plan: plan
      ).run()
    } catch {
      record(StepFailure("decode the plan", .invalid), folder)
    }
  } catch {
    record(StepFailure("read the plan", error), folder)
  }
}

func record(_ failure: StepFailure, _ folder: Handle) {
  do throws(Errno) { try ExitRecord.failed(failure).write(in: folder.descriptor) } catch {}
}
