//! An example body for each request that has one, for the schema and the reference that are made of it. Each is a body
//! that the API takes.

/// Method, path and body of each.
pub const EXAMPLES: &[(&str, &str, &str)] = &[
    ("put", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 512}"#),
    ("patch", "/machine-config", r#"{"mem_size_mib": 1024}"#),
    (
        "put",
        "/cpu-config",
        r#"{"cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0x0", "flags": 1, "modifiers": [{"register": "ebx", "bitmap": "0b0xxxxxxxxxxxxxxxx"}]}]}"#,
    ),
    (
        "put",
        "/boot-source",
        r#"{"kernel_image_path": "vmlinux", "initrd_path": "initramfs.cpio", "boot_args": "console=ttyS0 reboot=t panic=-1"}"#,
    ),
    ("put", "/logger", r#"{"log_path": "vm.log", "level": "Info", "show_level": true}"#),
    ("put", "/metrics", r#"{"metrics_path": "vm.metrics", "properties": {"customer": "7"}}"#),
    ("put", "/serial", r#"{"serial_out_path": "console.log"}"#),
    ("put", "/mmds", r#"{"latest": {"meta-data": {"instance-id": "i-1", "local-hostname": "web"}}}"#),
    ("patch", "/mmds", r#"{"latest": {"meta-data": {"local-hostname": "db", "instance-id": null}}}"#),
    ("put", "/mmds/config", r#"{"network_interfaces": ["eth0"], "version": "V2"}"#),
    ("put", "/actions", r#"{"action_type": "InstanceStart"}"#),
    ("patch", "/vm", r#"{"state": "Paused"}"#),
    (
        "put",
        "/snapshot/create",
        r#"{"snapshot_path": "vm.state", "mem_file_path": "vm.memory", "snapshot_type": "Full"}"#,
    ),
    (
        "put",
        "/snapshot/load",
        r#"{"snapshot_path": "vm.state", "mem_backend": {"backend_type": "File", "backend_path": "vm.memory"}, "resume_vm": true}"#,
    ),
    ("put", "/snapshot/working-set", r#"{"after_ms": 2000}"#),
    ("put", "/clones", r#"{"id": "clone-7"}"#),
    (
        "put",
        "/drives/{id}",
        r#"{"drive_id": "data", "path_on_host": "data.img", "is_root_device": false, "is_read_only": true}"#,
    ),
    (
        "patch",
        "/drives/{id}",
        r#"{"drive_id": "data", "rate_limiter": {"bandwidth": {"size": 10485760, "refill_time": 1000}}}"#,
    ),
    ("delete", "/drives/{id}", r#"{"force": true}"#),
    (
        "put",
        "/network-interfaces/{id}",
        r#"{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02"}"#,
    ),
    (
        "patch",
        "/network-interfaces/{id}",
        r#"{"iface_id": "eth0", "tx_rate_limiter": {"ops": {"size": 1000, "refill_time": 1000}}}"#,
    ),
    ("delete", "/network-interfaces/{id}", r#"{"force": true}"#),
    ("put", "/pmem/{id}", r#"{"id": "data", "path_on_host": "data.img", "read_only": true}"#),
    ("patch", "/pmem/{id}", r#"{"id": "data", "rate_limiter": {"ops": {"size": 100, "refill_time": 1000}}}"#),
    ("delete", "/pmem/{id}", r#"{"force": true}"#),
    ("put", "/vsock", r#"{"guest_cid": 3, "uds_path": "v.sock"}"#),
    ("put", "/entropy", r#"{"rate_limiter": {"bandwidth": {"size": 65536, "refill_time": 1000}}}"#),
    (
        "put",
        "/balloon",
        r#"{"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 5, "free_page_reporting": true}"#,
    ),
    ("patch", "/balloon", r#"{"amount_mib": 256}"#),
    ("patch", "/balloon/statistics", r#"{"stats_polling_interval_s": 10}"#),
    ("patch", "/balloon/hinting/start", r#"{"acknowledge_on_stop": true}"#),
    ("put", "/hotplug/memory", r#"{"total_size_mib": 2048, "block_size_mib": 2, "slot_size_mib": 128}"#),
    ("patch", "/hotplug/memory", r#"{"requested_size_mib": 1024}"#),
    ("put", "/console", r#"{"rate_limiter": {"size": 65536, "refill_time": 1000}}"#),
    ("put", "/ports/{id}", r#"{"id": "agent", "name": "org.example.agent", "uds_path": "agent.sock"}"#),
    ("delete", "/ports/{id}", r#"{"force": true}"#),
];
