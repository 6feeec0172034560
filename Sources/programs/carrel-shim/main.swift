// SPDX-License-Identifier: Apache-2.0
//
// git-credential-carrel, inside a workspace: git's credential helper.
//
// carrel-shim inject: makes one change of a sandbox's mounts, which it reads from its standard input, and exits.
//
// carrel-shim SANDBOX WORKSPACE: the supervisor of one sandbox. carreld starts it with the sandbox's directory at descriptor 3, the socket
// to listen on at 4 and the directory of the workspace's output at 5. It waits for agents, one of which sends the plan.

if let first = Process.arguments.first, first.split(separator: "/").last.map({ String($0) }) == GitHelper.name {
  Process.exit(
    GitHelper.run(
      Array(Process.arguments.dropFirst()), input: Descriptor(adopting: 0),
      tokenFile: "/run/carrel/credentials/" + CredentialBroker.tokenName))
}
if Process.arguments.count == 2, Process.arguments[1] == MountInjector.name {
  MountInjector.run()
}
runSupervisor()

func runSupervisor() {
  Process.setName("carrel-shim")
  Signals.ignorePipe()
  do throws(Errno) {
    // Descriptors that other threads of the agent had open at that moment, such as the pipe of a program, must not stay open here.
    try Process.closeAll(from: 6, except: [])
    try Process.closeOnExec(from: 3)
    try Signals.blockAll()
    // listen(2) again makes this process the one that a peer's SO_PEERCRED reports.
    try Socket.relisten(4)
  } catch {
    Process.exit(1)
  }
  Supervisor(
    folder: Handle(Descriptor(adopting: 3)), listener: Handle(Descriptor(adopting: 4)), logs: Handle(Descriptor(adopting: 5))
  ).run()
}
