// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Networking
internal import Volumes

/// The capabilities of a workspace: a new one is one folder beside this file and one line in `list`.
package struct Features: Sendable {
  let home: HomeFeature
  let packages: PackagesFeature
  let datasets: DatasetsFeature
  let credentials: CredentialsFeature
  let broker: BrokerFeature
  let network: NetworkFeature
  let limits: LimitsFeature
  let rescue: RescueFeature
  let exec = ExecFeature()
  /// All of them, in the order of their hooks.
  let list: [any WorkspaceFeature]

  /// Creates the features with the real drivers of this host.
  init(_ services: NodeServices) throws {
    let configuration = services.configuration
    let driver = try NetworkDriver(
      subnet: configuration.subnet, slots: configuration.maxWorkspaces, table: configuration.firewallTable,
      linkPrefix: configuration.linkPrefix)
    home = HomeFeature(
      services: services, volumes: try HomeVolumes(root: configuration.state + "/homes", holder: services.facts.name),
      registry: HomeRegistry(root: configuration.homes))
    packages = PackagesFeature(services: services, home: home)
    datasets = DatasetsFeature(services: services, images: try DatasetVolumes(root: configuration.state + "/datasets"))
    credentials = CredentialsFeature(services: services)
    broker = BrokerFeature(services: services, network: driver, controllers: ControllerProvider())
    network = NetworkFeature(services: services, driver: driver)
    limits = LimitsFeature(services: services)
    rescue = RescueFeature(services: services, home: home)
    list = [
      home,
      // Datasets may be mounted below the home.
      datasets,
      // A rescue renames and creates files in the home, which has to exist.
      rescue,
      packages,
      credentials,
      // Storage may take long, and until it is ready there is nothing to limit.
      limits,
      // The broker listens in the network namespace, whether or not the network is connected; a provider that is slow must not delay
      // the address.
      network,
      broker,
      ReadinessFeature(),
      LifetimeFeature(),
      OutOfMemoryFeature(services: services),
      StaleEnvironmentFeature(services: services),
      // Its programs use all of the above. As the last in the list it is the first to be told of an end.
      exec,
    ]
  }
}

/// The type that each feature's state is decoded as: one for each feature in `list` that has a state, which `RecordTests.states` checks.
let featureStates: [String: any FeatureState.Type] = [
  HomeFeature.name: HomeFeature.State.self,
  DatasetsFeature.name: DatasetsFeature.State.self,
  CredentialsFeature.name: CredentialsFeature.State.self,
  BrokerFeature.name: BrokerFeature.State.self,
  RescueFeature.name: RescueFeature.State.self,
  OutOfMemoryFeature.name: OutOfMemoryFeature.State.self,
  ExecFeature.name: ExecFeature.State.self,
]
