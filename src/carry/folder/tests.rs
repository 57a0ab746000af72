//! Tests of the files that are in a folder, or at two paths, after saves that end, are given up, or are cut off.

use super::*;
use crate::carry::replaced::state_of;

/// A state of which nothing but its first bytes is right.
const OLD: &[u8] = b"ALULASNP";

/// A folder that goes with the test.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("alula-folder-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn a_new_saved_machine_takes_the_place_of_the_old_one() {
    let place = Place::new("new");
    for id in [1, 2, 0xff] {
        let draft = Draft::in_folder(&place.0, id).unwrap();
        let mut file = draft.memory_file();
        file.write_all(&[id as u8]).unwrap();
        let name = draft.memory_name().unwrap();
        draft.keep(&state_of(Some(&name), &[id as u8])).unwrap();
        assert_eq!(place.names(), [&name, STATE]);
        assert_eq!(fs::read(place.0.join(&name)).unwrap(), [id as u8]);
        assert_eq!(fs::read(place.0.join(STATE)).unwrap(), state_of(Some(&name), &[id as u8]));
    }
}

#[test]
fn one_that_is_given_up_leaves_the_old_one_and_nothing_else() {
    let place = Place::new("given-up");
    Draft::in_folder(&place.0, 1).unwrap().keep(OLD).unwrap();
    let before = place.names();
    drop(Draft::in_folder(&place.0, 2).unwrap());
    assert_eq!(place.names(), before);
    // A save whose state cannot be written leaves the old one, too.
    let new = place.0.join(with_suffix(Path::new(STATE)));
    fs::create_dir(&new).unwrap();
    Draft::in_folder(&place.0, 3).err().unwrap();
    fs::remove_dir(&new).unwrap();
    assert_eq!((place.names(), fs::read(place.0.join(STATE)).unwrap()), (before, OLD.to_vec()));
}

#[test]
fn a_folder_made_for_one_that_is_given_up_goes_again() {
    let place = Place::new("made");
    let made = place.0.join("made");
    drop(Draft::in_folder(&made, 1).unwrap());
    assert!(!made.exists());
    // A file that somebody has put there meanwhile is not removed.
    let draft = Draft::in_folder(&made, 1).unwrap();
    fs::write(made.join("notes"), "mine").unwrap();
    drop(draft);
    assert_eq!(Place(made).names(), ["notes"]);
}

#[test]
fn what_a_crash_left_behind_goes_with_the_next_one() {
    let place = Place::new("crash");
    fs::write(place.0.join(format!("memory-{:032x}", 0xdead)), "half").unwrap();
    fs::write(place.0.join("state.alula-new"), "half").unwrap();
    fs::write(place.0.join(WORKING_SET), "ALULAWS1 of the memory that goes").unwrap();
    fs::write(place.0.join("notes"), "mine").unwrap();
    Draft::in_folder(&place.0, 1).unwrap().keep(b"new").unwrap();
    assert_eq!(place.names(), [&format!("memory-{:032x}", 1), "notes", STATE]);
}

#[test]
fn files_of_others_in_a_folder_are_neither_gone_nor_replaced() {
    let place = Place::new("others");
    let long = format!("memory-{:033x}", 1);
    let capital = format!("memory-{:032X}", 0xf);
    let mut theirs =
        ["memory-", "memory-2026", "memory-dead", &long, &capital, "state.new", WORKING_SET, "notes"];
    theirs.iter().for_each(|name| fs::write(place.0.join(name), "mine").unwrap());
    Draft::in_folder(&place.0, 1).unwrap().keep(OLD).unwrap();
    Draft::in_folder(&place.0, 2).unwrap().keep(OLD).unwrap();
    let ours = format!("memory-{:032x}", 2);
    let error = Beside::new(&place.0).err().unwrap().to_string();
    assert!(error.contains(WORKING_SET) && error.contains("remove it first"), "{error}");
    assert!(theirs.iter().all(|name| fs::read(place.0.join(name)).unwrap() == b"mine"));
    theirs.sort_unstable();
    let names = place.names();
    let others: Vec<_> = names.iter().filter(|name| **name != ours && *name != STATE).collect();
    assert_eq!((others.len(), names.len()), (theirs.len(), theirs.len() + 2), "{names:?}");
    // A state that is none of ours has the folder refused.
    let state = place.0.join(STATE);
    fs::write(&state, "solid").unwrap();
    let error = Draft::in_folder(&place.0, 3).err().unwrap().to_string();
    assert!(error.contains(&format!("`{}` is there already", state.display())), "{error}");
    assert_eq!((fs::read(&state).unwrap(), place.names()), (b"solid".to_vec(), names));
}

#[test]
fn two_at_once_do_not_save_to_one_folder() {
    let place = Place::new("two");
    let first = Draft::in_folder(&place.0, 1).unwrap();
    let error = Draft::in_folder(&place.0, 2).err().unwrap().to_string();
    assert!(error.contains("another process saves to it"), "{error}");
    drop(first);
    Draft::in_folder(&place.0, 2).unwrap();
}

#[test]
fn paths_of_their_own_are_replaced_as_well() {
    let place = Place::new("paths");
    let (state, memory) = (place.0.join("s"), place.0.join("m"));
    let old = state_of(None, b"old");
    fs::write(&memory, "old").unwrap();
    fs::write(&state, &old).unwrap();
    let mapped = File::open(&memory).unwrap();
    drop(Draft::at_paths(&state, &memory).unwrap());
    assert_eq!((fs::read(&state).unwrap(), fs::read(&memory).unwrap()), (old, b"old".to_vec()));
    let draft = Draft::at_paths(&state, &memory).unwrap();
    let mut file = draft.memory_file();
    file.write_all(b"new").unwrap();
    draft.keep(b"newer").unwrap();
    assert_eq!((fs::read(&state).unwrap(), fs::read(&memory).unwrap()), (b"newer".to_vec(), b"new".to_vec()));
    assert_eq!(mapped.metadata().unwrap().len(), 3, "who has mapped the old memory keeps it");
    assert_eq!(place.names(), ["m", "s"]);
}

#[test]
fn files_of_others_at_paths_are_not_replaced() {
    let place = Place::new("theirs");
    let (state, memory) = (place.0.join("s"), place.0.join("m"));
    let refused = |path: &Path| {
        let error = Draft::at_paths(&state, &memory).err().unwrap().to_string();
        assert!(error.contains(&format!("`{}` is there already", path.display())), "{error}");
    };
    fs::write(&state, "kernel").unwrap();
    refused(&state);
    fs::remove_file(&state).unwrap();
    fs::write(&memory, "disk").unwrap();
    refused(&memory);
    fs::write(&state, state_of(None, b"a disk")).unwrap();
    refused(&memory);
    assert_eq!(fs::read(&memory).unwrap(), b"disk");
    // Clients make empty files first, with the owner that the files are to have.
    [&state, &memory].iter().for_each(|path| fs::write(path, "").unwrap());
    Draft::at_paths(&state, &memory).unwrap().keep(OLD).unwrap();
    assert_eq!(place.names(), ["m", "s"]);
    // A snapshot in a folder is that of its folder.
    let folder = place.0.join("folder");
    let draft = Draft::in_folder(&folder, 1).unwrap();
    let name = draft.memory_name().unwrap();
    draft.keep(&state_of(Some(&name), b"")).unwrap();
    let error = Draft::at_paths(&folder.join(STATE), &memory).err().unwrap().to_string();
    assert!(error.contains("name the folder"), "{error}");
}

#[test]
fn a_crash_between_the_names_leaves_room_for_the_next_one() {
    let place = Place::new("between");
    let (state, memory) = (place.0.join("s"), place.0.join("m"));
    let crash = |left: &[u8]| {
        let _ = fs::remove_file(&state);
        fs::write(place.0.join("s.alula-new"), left).unwrap();
        fs::write(&memory, "memory").unwrap();
    };
    crash(&state_of(None, b"memory"));
    // One who saves there now has the file locked, and its memory is not touched.
    let other = File::open(place.0.join("s.alula-new")).unwrap();
    other.lock().unwrap();
    Draft::at_paths(&state, &memory).err().unwrap();
    assert!(memory.exists());
    drop(other);
    // The next one may be cut off or fail as well: what it is to replace has its names before.
    let draft = Draft::at_paths(&state, &memory).unwrap();
    assert_eq!(place.names(), ["m", "m.alula-new", "s", "s.alula-new"]);
    drop(draft);
    assert_eq!(place.names(), ["m", "s"]);
    crash(b"");
    Draft::at_paths(&state, &memory).err().unwrap();
}

#[test]
fn two_at_once_do_not_save_to_one_path() {
    let place = Place::new("two-paths");
    let (state, memory) = (place.0.join("s"), place.0.join("m"));
    let first = Draft::at_paths(&state, &memory).unwrap();
    let error = Draft::at_paths(&place.0.join("other"), &memory).err().unwrap().to_string();
    assert!(error.contains("an earlier request, saves there"), "{error}");
    Draft::at_paths(&state, &place.0.join("other")).err().unwrap();
    first.keep(&state_of(None, b"")).unwrap();
    // A file that a crash left is replaced, whatever is in it; a link there is not.
    fs::write(place.0.join("m.alula-new"), "half").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", place.0.join("s.alula-new")).unwrap();
    let error = Draft::at_paths(&state, &memory).err().unwrap().to_string();
    assert!(error.contains("File exists"), "{error}");
    fs::remove_file(place.0.join("s.alula-new")).unwrap();
    Draft::at_paths(&state, &memory).unwrap().keep(b"newer").unwrap();
    assert_eq!(
        (fs::read(&state).unwrap(), fs::read(&memory).unwrap(), place.names().len()),
        (b"newer".to_vec(), Vec::new(), 2)
    );
}

#[test]
fn what_a_crash_cut_off_at_its_end_is_finished_by_the_next_one() {
    let place = Place::new("finished");
    let (state, memory) = (place.0.join("s"), place.0.join("m"));
    let new = state_of(None, b"new");
    // The old state is gone; the old memory is there still, or the new one has its place.
    for (at, beside) in [(Some("old"), Some("new")), (Some("new"), None), (None, Some("new"))] {
        place.names().iter().for_each(|name| fs::remove_file(place.0.join(name)).unwrap());
        fs::write(place.0.join("s.alula-new"), &new).unwrap();
        at.into_iter().for_each(|text| fs::write(&memory, text).unwrap());
        beside.into_iter().for_each(|text| fs::write(place.0.join("m.alula-new"), text).unwrap());
        drop(Draft::at_paths(&state, &memory).unwrap());
        assert_eq!(place.names(), ["m", "s"]);
        assert_eq!((fs::read(&state).unwrap(), fs::read(&memory).unwrap()), (new.clone(), b"new".to_vec()));
    }
    // Without memory that can be its own, a state is no saved machine, and what is at the path is somebody else's.
    fs::rename(&state, place.0.join("s.alula-new")).unwrap();
    fs::write(&memory, "theirs").unwrap();
    let error = Draft::at_paths(&state, &memory).err().unwrap().to_string();
    assert!(error.contains(&format!("`{}` is there already", memory.display())), "{error}");
    assert_eq!(fs::read(&memory).unwrap(), b"theirs");
}

#[test]
fn what_is_no_file_is_not_replaced() {
    let place = Place::new("kinds");
    let error = Draft::at_paths(&place.0, &place.0.join("m")).err().unwrap().to_string();
    assert!(error.contains("something else than a file"), "{error}");
    std::os::unix::fs::symlink("/etc/passwd", place.0.join("l")).unwrap();
    Draft::at_paths(&place.0.join("s"), &place.0.join("l")).err().unwrap();
    let (here, dot) = (place.0.join("s"), place.0.join("../").join(place.0.file_name().unwrap()).join("s"));
    for (state, memory) in [(&here, &here), (&here, &dot), (&here, &place.0.join("s.alula-new"))] {
        let error = Draft::at_paths(state, memory).err().unwrap().to_string();
        assert!(error.contains("need a file each"), "{error}");
        Draft::at_paths(memory, state).err().unwrap();
    }
    let error = Draft::at_paths(&place.0.join("s"), &place.0.join("no/m")).err().unwrap().to_string();
    assert!(error.contains("there is no folder"), "{error}");
    assert_eq!(place.names(), ["l"]);
    fs::write(place.0.join("f"), "").unwrap();
    Draft::in_folder(&place.0.join("f"), 1).err().unwrap();
    Draft::in_folder(&place.0.join("a/b"), 1).err().unwrap();
}
