//! A published client of Firecracker's, the crate `fctools`, takes the monitor for a Firecracker: it
//! starts `alula` through a symbolic link and drives a guest from its configuration to its end.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;

use common::{Folder, PATIENCE, network};
use fctools::extension::metrics::spawn_metrics_task;
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::api::{VmApi, VmApiError};
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BootSource, Drive, DriveCacheType, EntropyDevice, LoggerSystem, MachineConfiguration, MetricsSystem,
    NetworkInterface, UpdateDrive, UpdateNetworkInterface,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::jailer::JailerArguments;
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::jailed::{FlatVirtualPathResolver, JailedVmmExecutor};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::id::VmmId;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, Resource, ResourceType};
use futures_util::StreamExt;

/// The user and the group of monitors in jails.
const JAILED: u32 = 1234;

type Guest = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;

/// What an orchestrator has on its disk: the three programs, and a place for a microVM's files.
struct Site {
    folder: Folder,
    installation: VmmInstallation,
    resources: ResourceSystem<DirectProcessSpawner, TokioRuntime>,
}

impl Site {
    /// Makes a site for machines in jails, whose monitor is a user of its own: no symbolic link leads to the program.
    fn for_jails() -> Self {
        let mut site = Self::new();
        let path = site.folder.path("monitor");
        std::fs::create_dir(&path).unwrap();
        let monitor = path.join("firecracker");
        std::fs::hard_link(common::alula(), &monitor)
            .or_else(|_| std::fs::copy(common::alula(), &monitor).map(drop))
            .unwrap();
        let program = |name: &str| site.folder.path(name);
        site.installation = VmmInstallation::new(monitor, program("jailer"), program("snapshot-editor"));
        let owner = VmmOwnershipModel::Downgraded { uid: JAILED, gid: JAILED };
        site.resources = ResourceSystem::new(DirectProcessSpawner, TokioRuntime, owner);
        site
    }

    /// Inside of a runtime.
    fn new() -> Self {
        let folder = Folder::new();
        let program = |name: &str| common::called(name, &folder);
        let installation =
            VmmInstallation::new(program("firecracker"), program("jailer"), program("snapshot-editor"));
        let resources = ResourceSystem::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
        Self { folder, installation, resources }
    }

    fn file(&mut self, path: PathBuf) -> Resource {
        self.resources.create_resource(path, ResourceType::Moved(MovedResourceType::HardLinked)).unwrap()
    }

    /// The firmware guest with `words`, a disk, an interface and an entropy device.
    fn configuration(&mut self, words: &str) -> VmConfigurationData {
        let (kernel, disk) = (self.folder.firmware(), self.folder.write("disk", [0; 4096]));
        VmConfigurationData {
            boot_source: BootSource {
                kernel_image: self.file(kernel),
                boot_args: Some(words.to_owned()),
                initrd: None,
            },
            drives: vec![Drive {
                drive_id: "data".to_owned(),
                is_root_device: false,
                cache_type: Some(DriveCacheType::Writeback),
                partuuid: None,
                is_read_only: Some(false),
                block: Some(self.file(disk)),
                rate_limiter: None,
                io_engine: None,
                socket: None,
            }],
            machine_configuration: MachineConfiguration {
                vcpu_count: 2,
                mem_size_mib: 64,
                smt: None,
                track_dirty_pages: None,
                huge_pages: None,
            },
            cpu_template: None,
            network_interfaces: vec![NetworkInterface {
                iface_id: "eth0".to_owned(),
                host_dev_name: "tap0".to_owned(),
                guest_mac: None,
                rx_rate_limiter: None,
                tx_rate_limiter: None,
            }],
            balloon_device: None,
            vsock_device: None,
            logger_system: None,
            metrics_system: None,
            mmds_configuration: None,
            entropy_device: Some(EntropyDevice::default()),
        }
    }

    /// A running guest; the folder goes with what is returned last.
    async fn start(self, init_method: InitMethod, data: VmConfigurationData) -> (Guest, Folder) {
        let socket = VmmApiSocket::Enabled(self.folder.path("api.socket"));
        let arguments = VmmArguments::new(socket).disable_seccomp().api_max_payload_bytes(60_000);
        let executor = UnrestrictedVmmExecutor::new(arguments).id(VmmId::new("fctools-guest").unwrap());
        let configuration = VmConfiguration::New { init_method, data };
        let mut vm = Vm::prepare(executor, self.resources, self.installation, configuration).await.unwrap();
        vm.start(PATIENCE).await.unwrap();
        (vm, self.folder)
    }
}

fn run(test: impl Future<Output = ()>) {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

fn by(method: VmShutdownMethod) -> [VmShutdownAction; 1] {
    [VmShutdownAction { method, timeout: Some(PATIENCE), graceful: true }]
}

#[test]
fn it_finds_the_programs_that_it_expects() {
    run(async {
        Site::new().installation.verify("1.17.0", &TokioRuntime).await.unwrap();
    });
}

#[test]
fn it_boots_a_guest_by_the_api_and_drives_it_to_its_end() {
    run(async {
        let mut site = Site::new();
        let mut data = site.configuration("case=block echo end=poweroff");
        let other_image = site.folder.write("other", [0; 8192]);
        let other_image = site.file(other_image);
        let fifo = ResourceType::Created(CreatedResourceType::Fifo);
        let metrics_path = site.folder.path("metrics");
        let metrics = site.resources.create_resource(&metrics_path, fifo).unwrap();
        data.metrics_system = Some(MetricsSystem { metrics });
        let log = site.resources.create_resource(site.folder.path("log"), fifo).unwrap();
        data.logger_system = Some(LoggerSystem { logs: Some(log), ..LoggerSystem::default() });
        let (mut vm, _folder) = site.start(InitMethod::ViaApiCalls, data).await;

        let info = vm.get_info().await.unwrap();
        assert_eq!((info.id.as_str(), info.is_paused), ("fctools-guest", false));
        assert_eq!((info.app_name.as_str(), info.vmm_version.as_str()), ("Firecracker", "1.17.0"));
        assert_eq!(vm.get_firecracker_version().await.unwrap(), "1.17.0");
        let machine = vm.get_machine_configuration().await.unwrap();
        assert_eq!((machine.vcpu_count, machine.mem_size_mib), (2, 64));

        vm.pause().await.unwrap();
        assert_eq!(vm.get_state(), VmState::Paused);
        assert!(vm.get_info().await.unwrap().is_paused);
        let mut metrics = spawn_metrics_task(&metrics_path, 10, TokioRuntime);
        vm.flush_metrics().await.unwrap();
        let line = metrics.receiver.next().await.unwrap();
        assert!(line.utc_timestamp_ms > 0 && line.put_api_requests.drive_count == 1, "{line:?}");
        vm.resume().await.unwrap();
        assert!(!vm.get_info().await.unwrap().is_paused);

        let drive_id = "data".to_owned();
        vm.update_drive(UpdateDrive { drive_id, block: Some(other_image), rate_limiter: None })
            .await
            .unwrap();
        let iface_id = "eth0".to_owned();
        let nothing = UpdateNetworkInterface { iface_id, rx_rate_limiter: None, tx_rate_limiter: None };
        vm.update_network_interface(nothing).await.unwrap();
        match vm.get_balloon_device().await.unwrap_err() {
            VmApiError::ReceivedErrorResponse { status_code, fault_message } => {
                assert_eq!(status_code, 400);
                assert!(fault_message.contains("No balloon device found."), "{fault_message}");
            }
            other => panic!("{other}"),
        }

        let outcome = vm.shutdown(by(VmShutdownMethod::WriteToSerial(b"bye\n".to_vec()))).await.unwrap();
        assert!(outcome.is_fully_graceful(), "{outcome:?}");
        assert_eq!(vm.get_state(), VmState::Exited);
        vm.cleanup().await.unwrap();
    });
}

#[test]
fn it_boots_a_guest_by_a_config_file_and_kills_it() {
    run(async {
        let mut site = Site::new();
        let data = site.configuration("case=serial end=idle");
        let file = site.folder.path("config.json");
        let (mut vm, _folder) = site.start(InitMethod::ViaJsonConfiguration(file), data).await;
        assert!(!vm.get_info().await.unwrap().is_paused);
        match vm.shutdown(by(VmShutdownMethod::PauseThenKill)).await {
            Ok(outcome) => assert!(!outcome.exit_status.success()),
            // The monitor may be gone before the client begins to wait for that.
            Err(error) => {
                let state = vm.get_state();
                let killed = |status: ExitStatus| status.signal() == Some(libc::SIGKILL);
                assert!(matches!(state, VmState::Crashed(status) if killed(status)), "{error}");
            }
        }
        vm.cleanup().await.unwrap();
    });
}

#[test]
fn it_learns_how_a_guest_ended() {
    run(async {
        let mut site = Site::new();
        let data = site.configuration("case=block echo end=7");
        let (mut vm, _folder) = site.start(InitMethod::ViaApiCalls, data).await;
        let outcome = vm.shutdown(by(VmShutdownMethod::WriteToSerial(b"bye\n".to_vec()))).await.unwrap();
        assert_eq!(outcome.exit_status.code(), Some(7));
        assert!(matches!(vm.get_state(), VmState::Crashed(status) if status.code() == Some(7)));
        vm.cleanup().await.unwrap();
    });
}

#[test]
fn it_boots_guests_in_jails() {
    common::root::settle();
    run(async {
        let id = VmmId::new("fctools-jailed").unwrap();
        for (is_attached, init_by_file) in [(true, false), (false, true)] {
            let mut site = Site::for_jails();
            let mut data = site.configuration("case=block echo end=poweroff");
            // A network interface would be root's, which the monitor in a jail is not.
            data.network_interfaces.clear();
            let base = site.folder.path("base");
            let jailer = JailerArguments::new(id.clone()).chroot_base_dir(&base).max_fd_limit(500);
            let jailer = if is_attached { jailer } else { jailer.daemonize().exec_in_new_pid_ns() };
            let arguments =
                VmmArguments::new(VmmApiSocket::Enabled("/run/api.socket".into())).disable_seccomp();
            let executor = JailedVmmExecutor::new(arguments, jailer, FlatVirtualPathResolver);
            let init_method = match init_by_file {
                true => InitMethod::ViaJsonConfiguration("/config.json".into()),
                false => InitMethod::ViaApiCalls,
            };
            let configuration = VmConfiguration::New { init_method, data };
            let (resources, installation) = (site.resources, site.installation);
            let mut vm = Vm::prepare(executor, resources, installation, configuration).await.unwrap();
            vm.start(PATIENCE).await.unwrap();
            assert_eq!(vm.get_info().await.unwrap().id, "fctools-jailed");
            let root = base.join("firecracker/fctools-jailed/root");
            assert_eq!(std::os::unix::fs::MetadataExt::uid(&root.join("run").metadata().unwrap()), JAILED);
            assert_eq!(root.join("firecracker.pid").exists(), !is_attached);
            let method = match is_attached {
                true => VmShutdownMethod::WriteToSerial(b"bye\n".to_vec()),
                false => VmShutdownMethod::Kill,
            };
            let outcome = vm.shutdown(by(method)).await.unwrap();
            // The status of a program that is nobody's child here is what is left of it in /proc: nothing, if it has
            // been waited for already.
            assert!(outcome.exit_status.success() || !is_attached, "{outcome:?}");
            vm.cleanup().await.unwrap();
            assert!(!root.exists());
        }
    });
}
