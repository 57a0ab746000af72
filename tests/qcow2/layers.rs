//! What lies beneath an image, and in which format.

use alula::devices::block::{Config, Overlay};
use alula::host::Host;

use super::*;

#[test]
fn an_overlay_is_sound_and_reads_as_what_is_beneath_it() {
    let folder = Folder::new();
    let base = pattern(1, SIZE);
    folder.write("base", &base);
    let (mut below, mut expected) = (Config::new("d", folder.path("base")), base.clone());
    for (name, beneath) in [("one", "raw"), ("two", "qcow2"), ("three", "qcow2")] {
        let (overlay, over) = Overlay::make(&below, &folder.path(name), &mut Host::default()).unwrap();
        overlay.keep();
        let check = |expected: &[u8]| {
            qemu_img(&folder, &["check", "-q", name]);
            folder.write("expected", expected);
            qemu_img(&folder, &["compare", "-q", "-f", "qcow2", "-F", "raw", name, "expected"]);
        };
        check(&expected);
        let told: Value = serde_json::from_str(&qemu_img(&folder, &["info", "--output=json", name])).unwrap();
        assert_eq!(
            (&told["backing-filename-format"], &told["virtual-size"]),
            (&json!(beneath), &json!(SIZE))
        );
        // The next overlay reads what is written to this one.
        let mut disk = Disk::new(serde_json::to_value(&over).unwrap()).unwrap();
        scribble(&mut disk, &mut expected, beneath.len() as u64);
        assert!(content(&mut disk) == expected);
        disk.end();
        check(&expected);
        below = over;
    }
    assert_eq!(below.backing.as_ref().unwrap().len(), 3);
    // The images beneath are found by the names in the images, too.
    below.backing = None;
    let (overlay, over) = Overlay::make(&below, &folder.path("four"), &mut Host::default()).unwrap();
    assert_eq!(over.backing.unwrap().len(), 4);
    drop(overlay);
    assert!(!folder.path("four").exists(), "one that is not kept is removed");
    let sparse = std::fs::File::create(folder.path("large")).unwrap();
    sparse.set_len(5 << 40).unwrap();
    below = Config::new("d", folder.path("large"));
    let (overlay, _) = Overlay::make(&below, &folder.path("over"), &mut Host::default()).unwrap();
    qemu_img(&folder, &["check", "-q", "over"]);
    drop(overlay);
    below.is_read_only = true;
    let refused = Overlay::make(&below, &folder.path("over"), &mut Host::default()).err().unwrap();
    assert!(refused.to_string().contains("leave `overlay` out"), "{refused}");
    assert_eq!(std::fs::read(folder.path("base")).unwrap(), base);
}

#[test]
fn a_chain_is_followed_within_its_folder_or_where_it_is_named() {
    let folder = Folder::new();
    let expected = chain(&folder, &[]);
    let create = |above: &str, beneath: &str, format: &str| {
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", "-u", "-b", beneath, "-F", format, above, "4M"]);
    };
    create("top", "disk", "qcow2");
    std::fs::create_dir(folder.path("inner")).unwrap();
    create("inner/up", "../disk", "qcow2");
    create("absolute", folder.path("disk").to_str().unwrap(), "qcow2");
    symlink("disk", folder.path("link")).unwrap();
    create("linked", "link", "qcow2");
    let open = |name: &str, more: Value| Disk::new(config(&folder.path(name), more));
    for name in ["disk", "top", "absolute", "linked"] {
        assert!(content(&mut open(name, json!({})).unwrap()) == expected, "{name}");
    }
    // Above the folder; where a link leads out of it; what is no file.
    create("inner/deep", "../inner/../base", "raw");
    symlink("../base", folder.path("inner/out")).unwrap();
    create("inner/outside", "out", "raw");
    create("protocol", "nbd://127.0.0.1/x", "raw");
    create("json", r#"json:{"driver":"file","filename":"base"}"#, "raw");
    for (name, expected) in [
        ("inner/up", "outside the image's folder: name it in `backing`"),
        ("inner/deep", "outside the image's folder: name it in `backing`"),
        ("inner/outside", "outside the image's folder: name it in `backing`"),
        ("protocol", "it is not the path of a file"),
        ("json", "it is not the path of a file"),
    ] {
        let error = open(name, json!({})).err().unwrap();
        assert!(error.contains(expected) && error.contains("use the image beneath it, `"), "{name}: {error}");
    }
    let base = json!({ "path_on_host": folder.path("base"), "format": "raw" });
    let disk = json!({ "path_on_host": folder.path("disk"), "format": "qcow2" });
    for name in ["inner/up", "protocol"] {
        let chain = if name == "protocol" { json!([base]) } else { json!([disk, base]) };
        let mut named = open(name, json!({ "backing": chain })).unwrap();
        assert!(content(&mut named) == expected, "{name}");
    }
    let refused = |name: &str, backing: Value| open(name, json!({ "backing": backing })).err().unwrap();
    assert!(refused("inner/up", json!([disk])).contains("`backing` does not name it: add it"));
    assert!(refused("disk", json!([])).contains("`backing` does not name it: add it"));
    assert!(refused("disk", json!([base, base])).contains("but no image says that something is beneath"));
    let taken_for_qcow2 = json!({ "path_on_host": folder.path("base"), "format": "qcow2" });
    assert!(
        refused("disk", json!([taken_for_qcow2]))
            .contains("with another format than `raw`, which the image says")
    );
}

#[test]
fn an_image_is_not_read_over_another_one_than_its_own() {
    let folder = Folder::new();
    let expected = chain(&folder, &[]);
    let copy = folder.path("copy");
    std::fs::copy(folder.path("base"), &copy).unwrap();
    std::fs::hard_link(folder.path("base"), folder.path("linked")).unwrap();
    let open = |name: &str| {
        let backing = json!([{ "path_on_host": folder.path(name), "format": "raw" }]);
        Disk::new(config(&folder.path("disk"), json!({ "backing": backing })))
    };
    for name in ["base", "linked"] {
        assert!(content(&mut open(name).unwrap()) == expected, "{name}");
    }
    let error = open("copy").err().unwrap();
    let said = format!("`backing` has `{}` there, which is another file", copy.display());
    assert!(error.contains("use the image beneath it, `") && error.contains(&said), "{error}");
    // Where the image's own base is gone, the list says where it is now.
    std::fs::remove_file(folder.path("base")).unwrap();
    assert!(content(&mut open("copy").unwrap()) == expected);
}

#[test]
fn what_cannot_be_beneath_is_said() {
    let folder = Folder::new();
    chain(&folder, &[]);
    let create = |above: &str, beneath: &str, more: &[&str]| {
        let options = ["create", "-q", "-f", "qcow2", "-u", "-b", beneath];
        qemu_img(&folder, &[&options, more, &[above, "4M"]].concat());
    };
    let qcow2 = &["-F", "qcow2"];
    create("missing", "nowhere", qcow2);
    create("itself", "other", qcow2);
    symlink("itself", folder.path("other")).unwrap();
    create("one", "two", qcow2);
    create("two", "one", qcow2);
    create("wrong", "base", qcow2);
    create("vmdk", "base", &["-F", "vmdk"]);
    create("format", "base", qcow2);
    // The extension that tells the format is made one that nobody knows.
    let image = File::options().read(true).write(true).open(folder.path("format")).unwrap();
    let mut header = [0; 512];
    image.read_exact_at(&mut header, 0).unwrap();
    let at = header.windows(4).position(|bytes| bytes == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    image.write_all_at(&[0x12, 0x34, 0x56, 0x78], at as u64).unwrap();
    for depth in 0..20 {
        let beneath = if depth == 0 { "disk".to_owned() } else { format!("deep{}", depth - 1) };
        create(&format!("deep{depth}"), &beneath, qcow2);
    }
    for (name, expected) in [
        ("missing", "use the image beneath it, `nowhere`: find it: No such file"),
        ("itself", "it is beneath itself: the images form a loop"),
        ("one", "it is beneath itself: the images form a loop"),
        ("wrong", "it is not a qcow2 image: give `raw` as its format"),
        ("vmdk", "its format `vmdk` is not supported"),
        ("format", "its format is not told, and never guessed"),
        ("deep19", "more than 16 images are beneath"),
    ] {
        let error = refused(config(&folder.path(name), json!({})));
        assert!(error.contains(expected), "{name}: {error}");
    }
    Disk::new(config(&folder.path("deep13"), json!({}))).unwrap();
}

#[test]
fn a_format_told_wrongly_is_an_error_or_exactly_that_format() {
    let folder = Folder::new();
    chain(&folder, &[]);
    let error = refused(config(&folder.path("base"), json!({})));
    assert!(error.contains("it is not a qcow2 image: give `raw` as its format"), "{error}");
    // A qcow2 image as a raw one is its own bytes: nothing is guessed from them.
    let raw = json!({ "format": "raw" });
    let mut disk = Disk::new(config(&folder.path("disk"), raw)).unwrap();
    assert_eq!(disk.read(0, 512).unwrap()[..4], *b"QFI\xfb");
}

#[test]
fn what_is_not_supported_is_said_with_what_to_do() {
    let folder = Folder::new();
    let create =
        |options: &str| qemu_img(&folder, &["create", "-q", "-f", "qcow2", "-o", options, "disk", "4M"]);
    for (options, expected) in [
        ("data_file=other", "its data is in another file, which is not followed"),
        ("compression_type=zstd", "its compression is not zlib"),
        ("extended_l2=on", "it has features that are not supported"),
    ] {
        create(options);
        let error = refused(config(&folder.path("disk"), json!({})));
        assert!(error.contains(expected), "{options}: {error}");
    }
    create("cluster_size=64k");
    let image = File::options().write(true).open(folder.path("disk")).unwrap();
    for (at, bytes, expected) in [
        (32, vec![0, 0, 0, 1], "it is encrypted"),
        (79, vec![1], "its reference counts are not in order: `qemu-img check -r all` it"),
        (79, vec![2], "it is marked as corrupt"),
        (4, vec![0, 0, 0, 9], "its header is broken: it tells of version 9"),
        (20, vec![0, 0, 0, 40], "its header is broken: it tells of clusters of 2^40 bytes"),
        (36, vec![0xff; 4], "a table of clusters of 34359738360 bytes, at most 33554432 are sane"),
        (24, vec![0x7f; 8], "for which its tables are too small"),
        (40, vec![0, 0, 1], "a table of clusters that is not within the file"),
        (56, vec![0, 0, 1, 0], "a table of reference counts of 16777216 bytes, at most 8388608 are sane"),
    ] {
        create("cluster_size=64k");
        image.write_all_at(&bytes, at).unwrap();
        let error = refused(config(&folder.path("disk"), json!({})));
        assert!(error.contains(expected), "{at}: {error}");
    }
}

#[test]
fn a_shrunk_image_opens_and_a_marked_one_is_only_read() {
    let folder = Folder::new();
    // Blocks of reference counts that tell of nothing are gone, but not the last one.
    let expected = pattern(3, SIZE);
    folder.write("raw", &expected);
    let options = "cluster_size=512,refcount_bits=64";
    qemu_img(&folder, &["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", options, "raw", "disk"]);
    qemu_img(&folder, &["resize", "-q", "--shrink", "-f", "qcow2", "disk", "1M"]);
    let image = File::options().read(true).write(true).open(folder.path("disk")).unwrap();
    let entry = |at: u64| {
        let mut entry = [0; 8];
        image.read_exact_at(&mut entry, at).unwrap();
        u64::from_be_bytes(entry)
    };
    let blocks: Vec<u64> = (0..64).map(|index| entry(entry(48) + index * 8)).collect();
    assert!(blocks.contains(&0), "{blocks:?}");
    let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
    let mut expected = expected[..1 << 20].to_vec();
    for at in (0..1 << 20).step_by(CLUSTER) {
        let bytes = pattern(at as u64, 8192);
        assert_eq!(disk.write((at / 512) as u64, &bytes), Ok(()));
        expected[at..at + 8192].copy_from_slice(&bytes);
    }
    disk.end();
    check(&folder, &expected);
    // Marked, it is read, itself and beneath another one.
    qemu_img(&folder, &["create", "-q", "-f", "qcow2", "-b", "disk", "-F", "qcow2", "above", "1M"]);
    for (mark, reason) in [(1, "its reference counts are not in order"), (2, "it is marked as corrupt")] {
        image.write_all_at(&[mark], 79).unwrap();
        let error = refused(config(&folder.path("disk"), json!({})));
        assert!(error.contains(reason) && error.contains("it can only be read (`is_read_only`"), "{error}");
        for (name, read_only) in [("disk", true), ("above", false)] {
            let more = json!({ "is_read_only": read_only });
            let mut disk = Disk::new(config(&folder.path(name), more)).unwrap();
            assert!(disk.read(128, CLUSTER).unwrap() == expected[CLUSTER..2 * CLUSTER], "{name} {mark}");
        }
        image.write_all_at(&[0], 79).unwrap();
    }
    image.write_all_at(&[1], 7).unwrap();
    let error = refused(config(&folder.path("disk"), json!({ "is_read_only": true })));
    assert!(error.contains("it is a qcow image of version 1, which is not supported"), "{error}");
}
