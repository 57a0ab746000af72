//! Merges that are cut off at each of their system calls: the old snapshot is there, or the merged one.

use std::cell::Cell;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::common::held::Held;
use super::common::{Folder, alula, run};
use super::crash::{Form, KILLS, Written, is_same, memory_in};

/// The calls by which files are made, written, flushed, named and removed.
const CALLS: &[i64] = &[
    libc::SYS_ftruncate,
    libc::SYS_pwrite64,
    libc::SYS_fsync,
    libc::SYS_write,
    libc::SYS_renameat,
    libc::SYS_unlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
];

/// A snapshot and a difference that comes after it, and the memory that they come to.
struct Ground {
    folder: Folder,
    /// The files of the memory before and after.
    old: PathBuf,
    merged: PathBuf,
}

impl Ground {
    fn new() -> Self {
        let mut written = Written::new();
        written.write();
        written.save("Diff", "diff");
        written.save("Full", "whole");
        let [old, merged] = ["base", "whole"].map(|name| memory_in(&written.folder.path(name)));
        assert!(!is_same(&old, &merged));
        Self { folder: written.folder, old, merged }
    }

    /// The files of a copy of the snapshot, as a merge is told of them.
    fn copy(&self, form: Form) -> Vec<PathBuf> {
        let [base, saved] = ["base", "saved"].map(|name| self.folder.path(name));
        let _ = fs::remove_dir_all(&saved);
        fs::create_dir(&saved).unwrap();
        let files = fs::read_dir(base).unwrap().map(|entry| entry.unwrap().path());
        for file in files {
            let name = file.file_name().unwrap();
            let is_state = name == "state";
            let name = match form {
                Form::Folder => Path::new(name),
                Form::Paths => Path::new(if is_state { "s" } else { "m" }),
            };
            fs::copy(&file, saved.join(name)).unwrap();
        }
        match form {
            Form::Folder => vec![saved],
            Form::Paths => vec![saved.join("s"), saved.join("m")],
        }
    }

    /// The words of the command for a merge into that copy.
    fn words(&self, form: Form, base: &[PathBuf]) -> Vec<PathBuf> {
        let diff = self.folder.path("diff");
        let memory = memory_in(&diff);
        let of = match form {
            Form::Folder => vec![diff],
            Form::Paths => vec![diff.join("state"), memory],
        };
        let words = ["snapshot", "merge"].map(PathBuf::from);
        words.into_iter().chain(base.iter().cloned()).chain(of).collect()
    }

    /// The memory of the snapshot in that copy, which is whole; None: there is no state.
    fn memory(&self, form: Form, base: &[PathBuf]) -> Option<PathBuf> {
        if form == Form::Paths && !base[0].exists() {
            return None;
        }
        let words = ["snapshot", "verify"].map(PathBuf::from);
        let verified = run(words.iter().chain(base));
        assert_eq!(verified.code, Some(0), "{}", verified.text);
        Some(if form == Form::Folder { memory_in(&base[0]) } else { base[1].clone() })
    }
}

/// Runs a merge until it is about to make a call that `is_meant`, and kills it there.
fn killed_at(words: &[PathBuf], is_meant: impl Fn(i64) -> bool) {
    let mut command = Command::new("sh");
    command.args(["-c", "read line; exec \"$@\"", "sh"]).arg(alula()).args(words);
    let mut merging = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut stdin = merging.stdin.take().unwrap();
    let held = Held::at_call(&merging, || stdin.write_all(b"\n").unwrap(), |call, _| is_meant(call));
    merging.kill().unwrap();
    drop(held);
    merging.wait().unwrap();
}

#[test]
fn a_merge_that_is_killed_leaves_the_old_or_the_merged() {
    // Where KVM is emulated, each command takes long.
    let few = if cfg!(target_arch = "aarch64") { 3 } else { 2 };
    let step = std::env::var_os(KILLS).map_or(few, |_| 1);
    let ground = Ground::new();
    for form in [Form::Folder, Form::Paths] {
        let base = ground.copy(form);
        let words = ground.words(form, &base);
        let all = Cell::new(0);
        killed_at(&words, |call| {
            all.set(all.get() + usize::from(CALLS.contains(&call)));
            call == libc::SYS_exit_group
        });
        assert!(is_same(&ground.memory(form, &base).unwrap(), &ground.merged));
        let (mut old, mut merged, mut none) = (0, 0, 0);
        for number in (0..all.get()).rev().step_by(step) {
            ground.copy(form);
            let seen = Cell::new(0);
            killed_at(&words, |call| {
                seen.set(seen.get() + usize::from(CALLS.contains(&call)));
                seen.get() > number
            });
            let there = ground.memory(form, &base);
            let is = |memory: &Path| there.as_ref().is_some_and(|there| is_same(there, memory));
            let (is_old, is_merged) = (is(&ground.old), is(&ground.merged));
            let at = format!("{form:?}, call {number}");
            assert!(is_old || is_merged || form == Form::Paths && there.is_none(), "{at}");
            old += usize::from(is_old);
            merged += usize::from(is_merged);
            none += usize::from(there.is_none());
            // The merge is asked for again, and done, or was done.
            let again = run(&words);
            let was_done = again.text.contains("which has these pages or later ones");
            assert!(again.code == Some(0) || was_done && !is_old, "{at}: {}", again.text);
            assert!(is_same(&ground.memory(form, &base).unwrap(), &ground.merged), "{at}");
        }
        println!("{form:?}: {old} times the old one, {merged} times the merged one, {none} times none yet");
        assert!(old > 0 && merged > 0, "{form:?}: {old} {merged}");
    }
}
