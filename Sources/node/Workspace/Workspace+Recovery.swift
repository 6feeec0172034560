// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Foundation
internal import Linux
internal import Logging
internal import ShimProtocol
internal import ShimClient
internal import Workspaces

/// Continues a workspace that another agent started, or whose supervisor was lost.
extension Workspace {
  /// Recovers a workspace that has not ended; `runAttempts` decides about one that has. Returns how its attempt continues; nil if it has
  /// ended, or this agent ends.
  func recover() async -> AttemptOrigin? {
    let record = record
    guard !record.state.isTerminal else { return nil }
    guard let place = record.sandbox else { return await launchAgain() }
    let isSameBoot = record.bootID == services.facts.bootID
    do {
      if isSameBoot, let found = try await reach(place) { return await resume(found) }
    } catch {
      return nil  // This agent ends.
    }
    // There is no supervisor: the files that it left decide, here and nowhere else.
    link = nil
    let (exit, hasPlan): (ExitRecord?, Bool?)
    do {
      exit = try await services.sandboxes.exitRecord(place)
      hasPlan = try await services.sandboxes.hasPlan(place)
    } catch {
      logger.error("cannot read a sandbox", metadata: ["workspace": "\(id)", "sandbox": "\(place.id)", "error": "\(describe(error))"])
      return (try? await Task.sleep(for: .seconds(1))) == nil ? nil : .recovered
    }
    guard !Task.isCancelled else { return nil }
    logger.notice("no supervisor", metadata: ["workspace": "\(id)", "record": "\(exit.map { "\($0)" } ?? "none")"])
    if isSameBoot, hasPlan == nil, record.state == .preparing, !record.spec.needsSecrets, !place.isLegacy {
      // The previous agent ended after it had accepted the launch and before it created the sandbox.
      return .accepting(Promise(()))
    }
    let mayHaveStarted = record.state != .pending && (hasPlan == true || !isSameBoot)
    if exit == nil, record.state == .pending || record.state == .preparing, !mayHaveStarted { return await launchAgain() }
    if isSameBoot { _ = await services.sandboxes.kill(place) }
    holdResources()
    await finishAttempt(nil)
    return nil
  }

  /// Connects to the supervisor of a sandbox, however long it takes to reply; nil if it has exited.
  func reach(_ place: SandboxPlace) async throws -> (any SandboxLink)? {
    let began = ContinuousClock.now
    while true {
      do {
        let found = try await services.sandboxes.connect(place)
        try Task.checkCancellation()
        if record.condition(.supervisorUnreachable) != nil { setCondition(.supervisorUnreachable, nil) }
        return found
      } catch {
        try Task.checkCancellation()
        // A supervisor that has just ended closes its connections first.
        if began.duration(to: .now) < .milliseconds(100) {
          try await Task.sleep(for: .milliseconds(20))
          continue
        }
        if record.condition(.supervisorUnreachable) == nil {
          logger.error("supervisor unreachable", metadata: ["workspace": "\(id)", "sandbox": "\(place.id)", "error": "\(describe(error))"])
          setCondition(.supervisorUnreachable, "its supervisor is alive and does not reply (\(describe(error)))")
        }
        // A stop that is due ends the workspace without its supervisor: first what runs in the sandbox, then the supervisor itself.
        if let stop = record.stop, killDelay(stop) <= .zero, await services.sandboxes.kill(place) {
          await services.sandboxes.killSupervisor(place)
        }
        try await Task.sleep(for: .seconds(1))
      }
    }
  }

  /// Continues with a sandbox whose supervisor a previous agent started.
  private func resume(_ found: any SandboxLink) async -> AttemptOrigin? {
    let spec = spec
    if record.sandbox?.isLegacy == true, record.startedNanoseconds == nil, record.state == .pending || record.state == .preparing,
      !found.status.state.isStarted
    {
      // Commit 7ede341 gave its supervisors no secrets before the start: the launch begins again with a current supervisor.
      try? found.send(.kill)
      _ = await found.hasEnded(within: .seconds(5))
      found.close()
      return await launchAgain()
    }
    if found.status.state == .awaitingPlan {
      let tokenName = services.tool(of: spec)?.tokenFile
      let known: LaunchSecrets?
      do {
        known = try await LaunchSecrets.recover(from: found, for: spec, tokenName: tokenName)
      } catch {
        // The secrets are requested again over another connection.
        found.close()
        return (try? await Task.sleep(for: .milliseconds(200))) == nil ? nil : .recovered
      }
      guard let entrusted = known else {
        await endSupervisor(found, record.sandbox)
        link = found
        holdResources()
        await finishAttempt(Workspace.credentialsLost)
        return nil
      }
      secrets = entrusted
      if let tokenName, secrets.token == nil {
        // The launch has had no reply yet, so no caller has another token.
        secrets.token = (tokenName, NodeServices.freshToken())
        var token = LaunchSecrets()
        token.token = secrets.token
        do {
          try await token.entrust(to: found, services.vault)
        } catch {
          guard !Task.isCancelled else { return nil }
          await endSupervisor(found, record.sandbox)
          return await launchAgain()
        }
      }
      if record.state == .pending { await transition(.preparationBegan) }
    }
    return .adopted(found)
  }

  private static let credentialsLost = Reason(
    .credentialsLost, "its supervisor was lost before the tool started, and with it the credentials of the launch; launch it again")

  /// Launches again if the supervisor was lost before it had anything to start; ends the attempt if that cannot be.
  func launchAgain() async -> AttemptOrigin? {
    guard !spec.needsSecrets, record.supervisorsLost < 5 else {
      holdResources()
      await finishAttempt(
        spec.needsSecrets
          ? Workspace.credentialsLost : Reason(.internal, "its supervisor was lost \(record.supervisorsLost) times before the tool started")
      )
      return nil
    }
    let old = record.sandbox
    do {
      let (place, found) = try await newSandbox()
      update {
        $0.occupy(place, services.facts.bootID)
        $0.supervisorsLost += 1
      }
      if record.state == .preparing { await transition(.supervisorLost, ["why": "its supervisor was lost before the tool started"]) }
      await discard(old)
      await transition(.preparationBegan)
      return .accepted(found)
    } catch {
      guard !Task.isCancelled else { return nil }
      holdResources()
      await finishAttempt(Reason(.internal, "cannot start another supervisor: \(describe(error))"))
      return nil
    }
  }
}
