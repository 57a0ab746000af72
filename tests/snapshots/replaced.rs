//! What a snapshot takes the place of: an earlier one, when the new one is whole, and nobody else's files.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::common::{self, run};
use super::{OLD, Saved, fault};

/// The names of what is in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn files(state: &Path, memory: &Path, kind: &str) -> String {
    json!({ "snapshot_path": state, "mem_file_path": memory, "snapshot_type": kind }).to_string()
}

/// A folder that goes with the test, and a folder in it whose file system has room for `size` bytes.
fn small_folder(size: u64) -> (common::Folder, PathBuf) {
    let folder = common::Folder::new();
    let small = folder.path("small");
    fs::create_dir(&small).unwrap();
    common::mount_tmpfs(&small, size);
    (folder, small)
}

/// Sees that the snapshot at `paths` is whole.
fn verify(paths: &[&Path]) {
    let ended = run([&["snapshot", "verify"].map(Path::new)[..], paths].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.text);
}

#[test]
fn a_state_that_has_no_room_leaves_the_old_snapshot_whole() {
    let (folder, small) = small_folder(512 << 10);
    let saved = Saved::new(&[]);
    let mut client = saved.service.client();
    let (state, memory) = (small.join("state"), folder.path("memory"));
    client.ok("PUT", "/snapshot/create", &files(&state, &memory, "Full"));
    let before = [&state, &memory].map(|path| fs::read(path).unwrap());
    // All the room that is left is taken.
    fs::write(small.join("full"), vec![1; 1 << 20]).unwrap_err();
    let told = client.request("PUT", "/snapshot/create", &files(&state, &memory, "Full")).fault();
    assert!(told.contains(small.to_str().unwrap()) && told.contains("No space left"), "{told}");
    assert!([&state, &memory].map(|path| fs::read(path).unwrap()) == before);
    verify(&[&state, &memory]);
    assert_eq!(
        (names(&small), names(&folder.0)),
        (vec!["full".into(), "state".into()], vec!["memory".into(), "small".into()])
    );
    fs::remove_file(small.join("full")).unwrap();
    client.ok("PUT", "/snapshot/create", &files(&state, &memory, "Full"));
    verify(&[&state, &memory]);
}

#[test]
fn a_difference_takes_the_place_of_neither_file() {
    let saved = Saved::new(&[]);
    let mut client = saved.service.client();
    client.ok("PUT", "/snapshot/create", &saved.create());
    let (state, memory, other) = (saved.path("state"), saved.path("memory"), saved.path("other"));
    for (paths, there) in [([&state, &other], &state), ([&other, &memory], &memory)] {
        let expected = format!("`{}` is there already: a difference needs files of its own", there.display());
        fault(&mut client, "/snapshot/create", &files(paths[0], paths[1], "Diff"), &expected);
    }
    verify(&[&state, &memory]);
}

#[test]
fn a_snapshot_takes_the_place_of_nobody_elses_file() {
    let saved = Saved::new(&[]);
    let mut client = saved.service.client();
    let (disk, state, memory) = (saved.path("disk"), saved.path("state"), saved.path("memory"));
    let kernel = saved.folder.write("kernel", b"\x7fELF");
    let refused = |client: &mut common::Client, paths: [&PathBuf; 2], there: &Path| {
        let expected = format!("`{}` is there already, and is no", there.display());
        fault(client, "/snapshot/create", &files(paths[0], paths[1], "Full"), &expected);
    };
    for file in [&disk, &kernel] {
        let before = fs::read(file).unwrap();
        refused(&mut client, [file, &memory], file);
        refused(&mut client, [&state, file], file);
        assert!(fs::read(file).unwrap() == before);
    }
    client.ok("PUT", "/snapshot/create", &saved.create());
    // A disk that is as long as the memory is no memory either.
    fs::File::options().write(true).open(&disk).unwrap().set_len(64 << 20).unwrap();
    let expected = format!("`{}` is there already, and is not the memory of", disk.display());
    fault(&mut client, "/snapshot/create", &files(&state, &disk, "Full"), &expected);
    client.ok("PUT", "/snapshot/create", &saved.create());
    let project = saved.path("project");
    fs::create_dir(&project).unwrap();
    fs::write(project.join("state"), "solid").unwrap();
    let expected = format!("`{}` is there already, and is no state", project.join("state").display());
    fault(&mut client, "/snapshot/create", &json!({ "folder": project }).to_string(), &expected);
    fs::rename(project.join("state"), project.join("memory-2026")).unwrap();
    client.ok("PUT", "/snapshot/create", &json!({ "folder": project }).to_string());
    client.ok("PUT", "/snapshot/create", &json!({ "folder": project }).to_string());
    assert_eq!(fs::read(project.join("memory-2026")).unwrap(), b"solid");
    verify(&[&project]);
    // The snapshot of a folder is replaced by another in that folder alone.
    let expected = "a snapshot in a folder is there: name the folder";
    fault(&mut client, "/snapshot/create", &files(&project.join("state"), &memory, "Full"), expected);
    verify(&[&project]);
}

#[test]
fn a_folder_that_was_made_for_a_failed_save_goes_again() {
    let (_folder, small) = small_folder(32 << 10);
    let saved = Saved::new(&[]);
    let mut client = saved.service.client();
    let body = |name: &str| json!({ "folder": small.join(name) }).to_string();
    fs::create_dir(small.join("there")).unwrap();
    for name in ["made", "there"] {
        let expected = format!("write the memory of the guest to `{}/memory-", small.join(name).display());
        fault(&mut client, "/snapshot/create", &body(name), &expected);
    }
    assert_eq!(names(&small), ["there"], "the folder of the user stays, empty");
    assert_eq!(names(&small.join("there")).len(), 0);
    fs::write(small.join("there/state"), OLD).unwrap();
    fault(&mut client, "/snapshot/create", &body("there"), "No space left");
    assert_eq!(names(&small.join("there")), ["state"]);
}

#[test]
fn a_folder_that_takes_a_difference_by_its_paths_stays_one() {
    let saved = Saved::new(&[]);
    let mut client = saved.service.client();
    let base = saved.path("base");
    client.ok("PUT", "/snapshot/create", &json!({ "folder": base }).to_string());
    let (state, memory) = (saved.path("state"), saved.path("memory"));
    client.ok("PUT", "/snapshot/create", &files(&state, &memory, "Diff"));
    let of_base = |name: &String| name.starts_with("memory-");
    let there = base.join(names(&base).into_iter().find(of_base).unwrap());
    let (in_base, copy) = (base.join("state"), saved.path("copy"));
    fs::copy(&there, &copy).unwrap();
    let merge = |memory_of_base: &Path| {
        let paths = [&in_base, memory_of_base, &state, &memory];
        run([&["snapshot", "merge"].map(Path::new)[..], &paths].concat())
    };
    // With other memory than its own, it would be a folder no more.
    let refused = merge(&copy);
    assert!(refused.code == Some(1) && refused.text.contains("name the folder"), "{}", refused.text);
    verify(&[&base]);
    let merged = merge(&there);
    assert_eq!(merged.code, Some(0), "{}", merged.text);
    assert_eq!(names(&base).len(), 2);
    verify(&[&base]);
}
