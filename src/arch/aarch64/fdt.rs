//! The flattened device tree (Devicetree Specification 0.4; bindings as in the Linux kernel's tree).

use vm_fdt::{Error, FdtWriter};

use super::layout::{self, affinity};
use crate::memory::Range;
use crate::platform::node::{TreeNode, phandle};
use crate::platform::{Gic, Node, Platform};

const PRIVATE: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// The device tree for `platform`.
pub fn tree(platform: &Platform) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_string("model", "Alula microVM")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", phandle::INTERRUPTS)?;

    let chosen = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", &platform.command_line)?;
    for node in &platform.nodes {
        if let Node::Chosen((name, value)) = node {
            fdt.property(name, value)?;
        }
    }
    fdt.property("rng-seed", &platform.random_seed)?;
    if let Some(initrd) = platform.initrd {
        fdt.property_u64("linux,initrd-start", initrd.start)?;
        fdt.property_u64("linux,initrd-end", initrd.end())?;
    }
    fdt.end_node(chosen)?;

    let ram = layout::ram(&platform.memory);
    let memory = fdt.begin_node(&format!("memory@{:x}", ram.start))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[ram.start, ram.size])?;
    fdt.end_node(memory)?;
    cpus(&mut fdt, platform)?;

    let psci = fdt.begin_node("psci")?;
    fdt.property_string_list("compatible", vec!["arm,psci-1.0".to_owned(), "arm,psci-0.2".to_owned()])?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(psci)?;

    // Secure, non-secure, virtual, hypervisor: PPIs 13, 14, 11, 10. To a GICv2, bits 8 to 15 are the CPUs.
    let cpus = match platform.gic {
        Some(Gic::V2(_)) => ((1 << platform.cpus) - 1) << 8,
        _ => 0,
    };
    let timer = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_null("always-on")?;
    let interrupts: Vec<_> =
        [13, 14, 11, 10].into_iter().flat_map(|ppi| [PRIVATE, ppi, LEVEL_HIGH | cpus]).collect();
    fdt.property_array_u32("interrupts", &interrupts)?;
    fdt.end_node(timer)?;

    gic(&mut fdt, platform)?;
    devices(&mut fdt, platform)?;

    fdt.end_node(root)?;
    fdt.finish()
}

fn gic(fdt: &mut FdtWriter, platform: &Platform) -> Result<(), Error> {
    let Range { start, size } = layout::GIC_DISTRIBUTOR;
    let node = fdt.begin_node(&format!("intc@{start:x}"))?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_null("ranges")?;
    fdt.property_phandle(phandle::INTERRUPTS)?;
    match platform.gic {
        Some(Gic::V2(_)) => {
            let cpu = layout::GIC_CPU_INTERFACE;
            fdt.property_string("compatible", "arm,gic-400")?;
            fdt.property_array_u64("reg", &[start, 0x1000, cpu.start, cpu.size])?;
        }
        _ => {
            let redistributors = layout::GIC_REDISTRIBUTOR_SIZE * u64::from(platform.cpus);
            fdt.property_string("compatible", "arm,gic-v3")?;
            fdt.property_array_u64("reg", &[start, size, layout::GIC_REDISTRIBUTORS, redistributors])?;
            fdt.property_array_u32("interrupts", &[PRIVATE, 9, LEVEL_HIGH])?;
        }
    }
    for part in &platform.nodes {
        if let Node::MessageTree(part) = part {
            self::node(fdt, part)?;
        }
    }
    if platform.pci && platform.message_frame().is_none() {
        its(fdt)?;
    }
    fdt.end_node(node)
}

fn its(fdt: &mut FdtWriter) -> Result<(), Error> {
    let Range { start, size } = layout::GIC_ITS;
    let its = fdt.begin_node(&format!("its@{start:x}"))?;
    fdt.property_string("compatible", "arm,gic-v3-its")?;
    fdt.property_null("msi-controller")?;
    fdt.property_u32("#msi-cells", 1)?;
    fdt.property_array_u64("reg", &[start, size])?;
    fdt.property_phandle(phandle::MESSAGES)?;
    fdt.end_node(its)
}

fn cpus(fdt: &mut FdtWriter, platform: &Platform) -> Result<(), Error> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for index in 0..u32::from(platform.cpus) {
        let cpu = fdt.begin_node(&format!("cpu@{:x}", affinity(index)))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u32("reg", affinity(index))?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(cpus)
}

/// Writes the nodes of the machine's parts. The clock comes first: some of these nodes refer to it.
fn devices(fdt: &mut FdtWriter, platform: &Platform) -> Result<(), Error> {
    let clock = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", 24_000_000)?;
    fdt.property_phandle(phandle::CLOCK)?;
    fdt.end_node(clock)?;
    for part in &platform.nodes {
        if let Node::Tree(part) = part {
            node(fdt, part)?;
        }
    }
    Ok(())
}

fn node(fdt: &mut FdtWriter, node: &TreeNode) -> Result<(), Error> {
    let open = fdt.begin_node(&node.name)?;
    for (name, value) in &node.properties {
        fdt.property(name, value)?;
    }
    for child in &node.children {
        self::node(fdt, child)?;
    }
    fdt.end_node(open)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affinities_are_those_that_kvm_gives() {
        assert_eq!([0, 15, 16, 255, 4096].map(affinity), [0, 15, 0x100, 0xf0f, 0x1_0000]);
    }

    fn platform(gic: Gic) -> Platform {
        Platform {
            cpus: 3,
            smt: false,
            memory: layout::memory(64 << 20),
            command_line: "console=ttyS0 marker".to_owned(),
            initrd: Some(Range { start: 0x4100_0000, size: 5 }),
            random_seed: [7; 32],
            nodes: vec![Node::MessageTree(TreeNode::new("messages"))],
            pci: true,
            gic: Some(gic),
        }
    }

    fn has(tree: &[u8], needle: &[u8]) -> bool {
        tree.windows(needle.len()).any(|window| window == needle)
    }

    #[test]
    fn the_tree_names_every_cpu_and_the_command_line() {
        let tree = tree(&platform(Gic::V3)).unwrap();
        assert!(has(&tree, b"cpu@2\0") && !has(&tree, b"cpu@3\0"));
        assert!(has(&tree, b"console=ttyS0 marker\0"));
        assert!(has(&tree, &0x4100_0005u64.to_be_bytes()), "the initrd's end");
    }

    #[test]
    fn the_tree_names_the_gic_there_is_and_what_takes_messages() {
        let v3 = tree(&platform(Gic::V3)).unwrap();
        assert!(has(&v3, b"arm,gic-v3\0") && has(&v3, b"arm,gic-v3-its\0") && !has(&v3, b"arm,gic-400"));
        let v2 = tree(&platform(Gic::V2(layout::GIC_MESSAGE_FRAME))).unwrap();
        assert!(has(&v2, b"arm,gic-400\0") && has(&v2, b"messages\0") && !has(&v2, b"arm,gic-v3"));
        assert!(has(&v2, &0x704u32.to_be_bytes()), "the timer's interrupts go to 3 CPUs");
    }
}
