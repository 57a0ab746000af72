//! Snapshots that have only what was written since the one before, and what they come to when they are merged.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::common::{Client, Folder, Service, called, mount_tmpfs, run};
use super::{GO_ON, PAUSE, fault};

/// What takes the firmware's benches, in MiB, and a little more.
const MEMORY: u64 = 112;

/// A guest that reads its disk when it is told to, and then stands still: its memory changes by what devices write
/// as well as by its CPU.
struct Reader {
    folder: Folder,
    service: Service,
    client: Client,
}

impl Reader {
    fn new(machine: &Value, extra: &[&str]) -> Self {
        let folder = Folder::new();
        // What is mounted here is seen by what is started afterwards.
        fs::create_dir(folder.path("full")).unwrap();
        mount_tmpfs(&folder.path("full"), 64 << 10);
        let disk: Vec<u8> = (0..(4_u64 << 20) / 8).flat_map(|word| (word * 7 + 1).to_le_bytes()).collect();
        folder.write("disk", disk);
        let service = Service::start(extra);
        let mut client = service.client();
        let mut config = json!({ "vcpu_count": 1, "mem_size_mib": MEMORY });
        config.as_object_mut().unwrap().extend(machine.as_object().unwrap().clone());
        client.ok("PUT", "/machine-config", &config.to_string());
        let disk =
            json!({ "drive_id": "disk", "is_root_device": false, "path_on_host": folder.path("disk") });
        client.ok("PUT", "/drives/disk", &disk.to_string());
        service.boot_source("bench");
        client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        let mut reader = Self { folder, service, client };
        reader.service.process.expect("bench: ready");
        reader.client.ok("PATCH", "/vm", PAUSE);
        reader
    }

    /// Goes on in another process, from the files `name`.
    fn restored(self, name: &str, more: &Value) -> Self {
        let Self { folder, service, .. } = self;
        drop(service);
        let service = Service::start(&[]);
        let mut client = service.client();
        let memory =
            json!({ "backend_type": "File", "backend_path": folder.path(&format!("{name}.memory")) });
        let mut load = json!({ "snapshot_path": folder.path(name), "mem_backend": memory });
        load.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.ok("PUT", "/snapshot/load", &load.to_string());
        Self { folder, service, client }
    }

    /// Lets it read so many requests of its disk.
    fn read(&mut self, bytes: u32, count: u32) {
        self.client.ok("PATCH", "/vm", GO_ON);
        let line = format!("read {bytes} 2 {count}\n");
        self.service.process.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
        self.service.process.expect(&format!("done {count}"));
        self.client.ok("PATCH", "/vm", PAUSE);
    }

    fn create(&self, kind: &str, folder: &Path, name: &str) -> String {
        let memory = folder.join(format!("{name}.memory"));
        json!({ "snapshot_type": kind, "snapshot_path": folder.join(name), "mem_file_path": memory })
            .to_string()
    }

    fn save(&mut self, kind: &str, name: &str) {
        let create = self.create(kind, &self.folder.path("."), name);
        self.client.ok("PUT", "/snapshot/create", &create);
        if kind == "Full" {
            return;
        }
        let checked = run([Path::new("snapshot"), Path::new("verify"), &self.path(name), &self.memory(name)]);
        assert!(checked.code == Some(0) && checked.text.contains("a difference"), "{}", checked.text);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }

    fn memory(&self, name: &str) -> PathBuf {
        self.folder.path(&format!("{name}.memory"))
    }

    /// Merges each of `diffs` into the one called `base`.
    fn merge(&self, base: &str, diffs: &[&str]) {
        for diff in diffs {
            let paths = [self.path(base), self.memory(base), self.path(diff), self.memory(diff)];
            let words = ["snapshot", "merge"].map(PathBuf::from);
            let merged = run(words.iter().chain(&paths));
            assert_eq!(merged.code, Some(0), "{}", merged.text);
        }
    }

    /// Sees that `diff` is not merged into `base`, of which nothing changes.
    fn refuse_merge(&self, base: &str, diff: &str, expected: &str) {
        let paths = [self.path(base), self.memory(base), self.path(diff), self.memory(diff)];
        let before = [fs::read(&paths[0]).unwrap(), fs::read(&paths[1]).unwrap()];
        let words = ["snapshot", "merge"].map(PathBuf::from);
        let refused = run(words.iter().chain(&paths));
        assert!(refused.code == Some(1) && refused.text.contains(expected), "{}", refused.text);
        assert!(refused.text.contains("leave none out"), "{}", refused.text);
        assert!(before == [fs::read(&paths[0]).unwrap(), fs::read(&paths[1]).unwrap()]);
    }

    /// Whether two files have the same memory; the first page that differs is told.
    fn assert_same(&self, one: &str, other: &str) {
        let [one, other] = [one, other].map(|name| fs::read(self.memory(name)).unwrap());
        assert_eq!(one.len(), other.len());
        let differs = one.chunks(4096).zip(other.chunks(4096)).position(|(one, other)| one != other);
        assert_eq!(differs.map(|page| page * 4096), None, "the first byte of a page that differs");
    }

    fn blocks(&self, name: &str) -> u64 {
        fs::metadata(self.memory(name)).unwrap().blocks() * 512
    }
}

/// Several differences in a row, one of which cannot be written, and a whole snapshot of the same moment.
fn save_chain(reader: &mut Reader) {
    let full = reader.folder.path("full");
    reader.save("Full", "base");
    reader.read(4096, 3);
    reader.save("Diff", "1");
    reader.read(65_536, 12);
    let create = reader.create("Diff", &full, "2");
    fault(&mut reader.client, "/snapshot/create", &create, "No space left");
    assert_eq!(fs::read_dir(&full).unwrap().count(), 0, "nothing is left of what could not be written");
    reader.read(4096, 1);
    reader.save("Diff", "2");
    // Nothing has run since.
    reader.save("Diff", "3");
    reader.read(16_384, 20);
    reader.save("Diff", "4");
    reader.save("Full", "whole");
}

fn check_chain(reader: Reader, is_noted: bool) {
    let diffs = ["1", "2", "3", "4"];
    if is_noted {
        // The pages that were written between the two are in the difference `1`: `2` is not merged without it.
        reader.refuse_merge("base", "2", "of that microVM; what it is to be merged into is snapshot");
    }
    reader.merge("base", &diffs);
    reader.refuse_merge("base", "1", "which has these pages or later ones");
    reader.refuse_merge("whole", "4", "which has these pages or later ones");
    reader.assert_same("base", "whole");
    let refused = run(["snapshot", "merge", "a", "b"]);
    assert!(refused.code == Some(1) && refused.text.contains("`a/state`"), "{}", refused.text);
    // What was merged is the last difference's machine with all of its memory.
    let mut again = reader.restored("base", &json!({}));
    again.read(4096, 2);
    again.save("Diff", "later");
    again.refuse_merge("whole", "later", "of another microVM, or from before or after another restore");
    again.merge("base", &["later"]);
    again.client.ok("PATCH", "/vm", GO_ON);
    again.service.process.stdin.as_mut().unwrap().write_all(b"end\n").unwrap();
    assert_eq!(again.service.process.end().code, Some(0));
}

#[test]
fn differences_of_noted_writes_come_to_the_whole() {
    let mut reader = Reader::new(&json!({ "track_dirty_pages": true }), &[]);
    save_chain(&mut reader);
    assert!(reader.blocks("3") < 64 << 10, "{} bytes, and nothing was written", reader.blocks("3"));
    assert!(reader.blocks("1") < 1 << 20 && reader.blocks("2") > 128 << 10);
    check_chain(reader, true);
}

#[test]
fn differences_of_a_restored_guest_are_its_own_pages() {
    for (name, track, extra) in [("own", false, &[][..]), ("noted", true, &["--enable-pci"])] {
        let mut reader = Reader::new(&json!({}), extra);
        reader.save("Full", name);
        let mut reader = reader.restored(name, &json!({ "track_dirty_pages": track }));
        reader.read(65_536, 2);
        reader.save("Diff", "first");
        assert!(reader.blocks("first") < 1 << 20, "{} bytes", reader.blocks("first"));
        reader.merge(name, &["first"]);
        reader.save("Full", "same");
        reader.assert_same(name, "same");
        for file in ["same", "first"] {
            fs::remove_file(reader.memory(file)).unwrap();
        }
        save_chain(&mut reader);
        check_chain(reader, track);
    }
}

#[test]
fn differences_without_a_snapshot_before_have_all_that_was_touched() {
    let mut reader = Reader::new(&json!({}), &[]);
    reader.read(65_536, 3);
    reader.save("Diff", "diff");
    reader.save("Full", "whole");
    reader.assert_same("diff", "whole");
}

#[test]
fn people_save_differences_and_merge_them() {
    let mut reader = Reader::new(&json!({ "track_dirty_pages": true }), &[]);
    let socket = reader.service.socket.to_str().unwrap().to_owned();
    let [base, diff] = ["base", "diff"].map(|name| reader.folder.path(name).to_str().unwrap().to_owned());
    let refused = |words: &[&str], expected: &str| {
        let ended = run(words);
        assert!(ended.code != Some(0) && ended.text.contains(expected), "{words:?}: {}", ended.text);
    };
    let saved = |words: &[&str]| assert_eq!(run(words).code, Some(0), "{words:?}");
    saved(&["ctl", "--api-sock", &socket, "snapshot", &base]);
    let again = ["ctl", "--api-sock", &socket, "snapshot", &base, "--diff"];
    refused(&again, "a difference needs files of its own, and the snapshot before it");
    reader.read(65_536, 2);
    saved(&["ctl", "--api-sock", &socket, "snapshot", &diff, "--diff"]);
    let told: Value = serde_json::from_str(&run(["snapshot", "inspect", &diff]).text).unwrap();
    assert_eq!(told["kind"], "Diff");
    assert!(told["snapshot"]["number"] == 2 && told["after"]["number"] == 1, "{told}");
    let said =
        format!("`{diff}/state` is the state of a difference, which has only the memory that was written");
    refused(&["run", "--restore", &diff], &said);
    refused(&["template", &diff, "--api-sock", &format!("{diff}/t.sock")], &said);
    refused(&["snapshot", "merge", &base, &base], "the one that is to be merged is no difference");
    refused(&["snapshot", "merge", &diff, &diff], "is a difference itself");
    let names = || {
        let entries = fs::read_dir(&base).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = entries.collect();
        names.sort();
        names
    };
    let before = names();
    let pages = fs::read_dir(&diff).unwrap().map(|entry| entry.unwrap().path());
    let pages = pages.into_iter().find(|path| !path.ends_with("state")).unwrap();
    let whole = fs::read(&pages).unwrap();
    fs::write(&pages, vec![9; whole.len()]).unwrap();
    refused(&["snapshot", "merge", &base, &diff], "it is damaged: the MiB at");
    assert_eq!(names(), before, "the old one stays when nothing can be merged");
    // What has copied the file may have filled its holes.
    fs::write(&pages, &whole).unwrap();
    saved(&["snapshot", "merge", &base, &diff]);
    assert!(names() != before && names().len() == 2, "{:?}", names());
    saved(&["snapshot", "verify", &base]);
}

#[test]
fn a_memory_file_takes_the_pages_of_a_difference_without_states() {
    let mut reader = Reader::new(&json!({ "track_dirty_pages": true }), &[]);
    reader.save("Full", "base");
    reader.read(65_536, 2);
    reader.save("Diff", "diff");
    reader.save("Full", "whole");
    let editor = called("snapshot-editor", &reader.folder);
    let edit = |memory: &Path, diff: &Path| {
        let words = ["edit-memory", "rebase", "--memory-path"];
        let output =
            Command::new(&editor).args(words).arg(memory).arg("--diff-path").arg(diff).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (base, diff) = (reader.memory("base"), reader.memory("diff"));
    let before = fs::read(&base).unwrap();
    let none = reader.path("none");
    fs::write(reader.path("short"), vec![1; 4096]).unwrap();
    for (memory, diff, expected) in [
        (&base, &none, "No such file"),
        (&none, &diff, "No such file"),
        (&base, &reader.path("short"), "the difference has 4096 bytes, and the memory"),
        (&reader.folder.0, &diff, "directory"),
    ] {
        let (code, text) = edit(memory, diff);
        assert!(code == Some(1) && text.contains(expected), "{code:?} {text}");
    }
    assert!(fs::read(&base).unwrap() == before);
    // A difference that is put into memory once more does no harm.
    for _ in 0..2 {
        assert_eq!(edit(&base, &diff), (Some(0), String::new()));
        reader.assert_same("base", "whole");
    }
    for words in [&["edit-memory"][..], &["edit-memory", "rebase", "--memory-path", "m"], &["inspect", "s"]] {
        assert_eq!(Command::new(&editor).args(words).output().unwrap().status.code(), Some(153), "{words:?}");
    }
    let ours = ["snapshot", "merge", "a", "b", "--diff-path", "c"];
    assert!(run(ours).text.contains("are for `edit-memory rebase`"));
    fs::rename(&base, reader.memory("diff")).unwrap();
    let mut again = reader.restored("diff", &json!({}));
    again.read(4096, 1);
}
