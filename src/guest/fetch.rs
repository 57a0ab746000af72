//! Fetches a kernel with the modules that guests need: a package of the machine's distribution, by its own apt, downloaded
//! and unpacked, and nothing installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::kernel;
use super::modules::{Module, Modules};
use super::program::{APT_HELPER, program, run, run_in_sight};
use crate::error::{Context, Error, Result};

/// What guests may need: transports, devices, and what roots are made of.
const MODULES: &str = "virtio_mmio virtio_pci virtio_blk virtio_net virtio_rng virtio_balloon virtio_mem virtio_pmem \
    nd_pmem vmw_vsock_virtio_transport overlay erofs squashfs";
/// Packages that depend on the newest kernel: for virtual machines, or for all.
const PACKAGES: [&str; 2] = ["linux-image-cloud-", "linux-image-"];

const MISSING: &str = "on one with apt and dpkg this works; elsewhere, name a kernel by --kernel";

const ELSEWHERE: &str =
    "of newer kernels, other packages of the same version have parts: --from may be given again";

/// A folder that is removed if it has not become something else.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Fetches a kernel: out of the packages `from`, files or URLs, or the newest of the distribution's. Returns where it is.
/// `say` is told each step, before it begins.
pub fn fetch(from: &[String], say: impl Fn(&str)) -> Result<PathBuf> {
    let place = kernel::fetched();
    let scratch = Scratch(place.with_extension(format!("new-{}", std::process::id())));
    let work = &scratch.0;
    let packages = work.join("packages");
    let created = fs::create_dir_all(&packages).map_err(|error| kernel::cannot_keep(&error));
    created.with_context(|| format!("create `{}`", packages.display()))?;
    for from in from {
        if Path::new(from).is_file() {
            unpack(Path::new(from), &packages)?;
        } else if from.contains("://") {
            say(&format!("fetching {from}"));
            let file = work.join("package.deb");
            let mut download = program(APT_HELPER);
            run_in_sight(download.arg("download-file").arg(from).arg(&file), MISSING).with_context(|| {
                format!("fetch {from} (a file that was downloaded otherwise does: --from FILE)")
            })?;
            unpack(&file, &packages)?;
        } else {
            return Err(Error::config(format!("there is no file `{from}`")));
        }
    }
    if from.is_empty() {
        fetch_newest(work, &packages, &say)?;
    }
    say("taking the kernel and its modules out of it");
    let made = work.join("made");
    collect(&packages, &made)?;
    let attempt = || format!("put the kernel at `{}`", place.display());
    if place.exists() {
        fs::remove_dir_all(&place).with_context(attempt)?;
    }
    fs::rename(&made, &place).with_context(attempt)?;
    Ok(place.join(kernel::NAME))
}

/// An apt of our own: the system's lists and state are left alone. Where no terminal shows what it prints, apt leaves its
/// progress out.
fn apt(work: &Path, name: &str) -> Command {
    let mut command = program(name);
    for (name, folder) in [("Dir::State", "state"), ("Dir::Cache", "cache"), ("Dir::State::status", "status")]
    {
        command.arg("-o").arg(format!("{name}={}", work.join(folder).display()));
    }
    command.args(["-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"]);
    command
}

fn fetch_newest(work: &Path, packages: &Path, say: &impl Fn(&str)) -> Result<()> {
    let attempt = || format!("write in `{}`", work.display());
    for folder in ["state/lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(work.join(folder)).with_context(attempt)?;
    }
    fs::write(work.join("status"), "").with_context(attempt)?;
    say("fetching the lists of the distribution's packages");
    let update =
        run_in_sight(apt(work, "apt-get").arg("update"), MISSING).context("fetch the lists of packages")?;
    let architecture = run(program("dpkg").arg("--print-architecture"), MISSING)?.stdout;
    let architecture = String::from_utf8_lossy(&architecture);
    let is_image = |name: &String| name.starts_with("linux-image-");
    let mut images = PACKAGES.iter().filter_map(|prefix| {
        // A distribution may not have it.
        depends(work, &format!("{prefix}{}", architecture.trim())).into_iter().find(is_image)
    });
    let image = images.next().ok_or_else(|| {
        // A list that cannot be fetched is no error to apt.
        let told = String::from_utf8_lossy(&update.stderr);
        let failed = told.lines().find_map(|line| line.strip_prefix("W: Failed to fetch "));
        let why = match failed {
            Some(list) => format!("its lists cannot be fetched: {}", crate::log::in_one_line(list)),
            None => "the distribution has no package linux-image-cloud or linux-image".to_owned(),
        };
        Error::host(format!("{why} (name a package by --from, as a URL or a file)"))
    })?;
    // Newer kernels' packages are empty, and depend on those of the same version that have the kernel, its modules, and
    // which of them are in it.
    let version = image.trim_start_matches("linux-image-").to_owned();
    let is_part = |name: &String| name.ends_with(&version);
    let mut names: Vec<_> = depends(work, &image).into_iter().filter(is_part).collect();
    names.push(image);
    let list = names.join(", ");
    say(&format!("fetching {list}"));
    run_in_sight(apt(work, "apt-get").arg("download").args(&names).current_dir(work), MISSING)
        .with_context(|| format!("fetch {list}"))?;
    let files = fs::read_dir(work).with_context(attempt)?.flatten().map(|entry| entry.path());
    let is_package = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "deb");
    files.filter(is_package).try_for_each(|file| unpack(&file, packages))
}

/// What a package depends on; of one that there is not, nothing.
fn depends(work: &Path, package: &str) -> Vec<String> {
    let told = run(apt(work, "apt-cache").args(["depends", package]), MISSING).map(|output| output.stdout);
    let told = told.unwrap_or_default();
    let lines = String::from_utf8_lossy(&told);
    lines.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned).collect()
}

fn unpack(file: &Path, packages: &Path) -> Result<()> {
    let attempt = || format!("unpack `{}` (a Debian package is needed)", file.display());
    run(program("dpkg-deb").arg("-x").arg(file).arg(packages), MISSING).with_context(attempt).map(drop)
}

/// Takes the kernel and the modules out of what was unpacked.
fn collect(packages: &Path, made: &Path) -> Result<()> {
    let attempt = || format!("look for a kernel in what was unpacked in `{}`", packages.display());
    let only = |folder: PathBuf, what: &str| {
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let name = |path: &PathBuf| {
            path.file_name().and_then(|name| name.to_str()).map(str::to_owned).unwrap_or_default()
        };
        entries.filter(|path| name(path).starts_with(what)).max()
    };
    let folder =
        only(packages.join("lib/modules"), "").or_else(|| only(packages.join("usr/lib/modules"), ""));
    let folder = folder
        .ok_or_else(|| Error::config(format!("it has no /lib/modules/VERSION ({ELSEWHERE})")))
        .with_context(attempt)?;
    let image = only(packages.join("boot"), "vmlinuz-").or_else(|| only(folder.clone(), "vmlinuz"));
    let image = image
        .ok_or_else(|| Error::config(format!("it has no /boot/vmlinuz-VERSION ({ELSEWHERE})")))
        .with_context(attempt)?;
    let modules = Modules::in_folder(&folder)?;
    let to = made.join("modules");
    let copy =
        |from: &Path, to: PathBuf| fs::copy(from, &to).with_context(|| format!("write `{}`", to.display()));
    fs::create_dir_all(&to).with_context(|| format!("create `{}`", to.display()))?;
    copy(&image, made.join(kernel::NAME))?;
    for Module { file_name, content } in modules.closure(&MODULES.split(' ').collect::<Vec<_>>())? {
        let to = to.join(file_name);
        fs::write(&to, content).with_context(|| format!("write `{}`", to.display()))?;
    }
    let builtin = "modules.builtin";
    let missing = || format!("find out what is in the kernel itself ({ELSEWHERE})");
    copy(&folder.join(builtin), to.join(builtin)).with_context(missing).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_and_its_modules_are_taken_out_of_a_package() {
        let folder = Scratch(std::env::temp_dir().join(format!("alula-fetch-{}", std::process::id())));
        let root = folder.0.join("root");
        for place in ["boot", "lib/modules/6.9/kernel/a", "lib/modules/6.9/kernel/b"] {
            fs::create_dir_all(root.join(place)).unwrap();
        }
        fs::write(root.join("boot/vmlinuz-6.9"), "kernel").unwrap();
        let modules = root.join("lib/modules/6.9");
        for (number, name) in MODULES.split(' ').enumerate() {
            let path = modules.join(format!("kernel/a/{}.ko", name.replace('_', "-")));
            fs::write(&path, "\x7fELF\0depends=more\0").unwrap();
            // Some are packed.
            if number % 2 == 0 {
                assert!(Command::new("gzip").arg(&path).status().unwrap().success());
            }
        }
        fs::write(modules.join("kernel/b/more.ko"), "\x7fELF\0depends=\0").unwrap();
        fs::write(modules.join("kernel/b/not-needed.ko"), "\x7fELF\0depends=\0").unwrap();
        let error = collect(&root, &folder.0.join("made")).unwrap_err().to_string();
        assert!(error.contains("modules.builtin"), "{error}");
        fs::write(modules.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        let made = folder.0.join("again");
        collect(&root, &made).unwrap();
        let found = kernel::find(Some(&made.join(kernel::NAME))).unwrap();
        let closure = found.modules.unwrap().closure(&["ext4", "virtio_mmio", "overlay"]).unwrap();
        let names: Vec<_> = closure.iter().map(|module| &module.file_name[..]).collect();
        assert_eq!(names, ["more.ko", "virtio-mmio.ko", "overlay.ko"]);
        assert!(!made.join("modules/not-needed.ko").exists());
        // Newer packages have the kernel among its modules.
        fs::rename(root.join("boot/vmlinuz-6.9"), modules.join("vmlinuz")).unwrap();
        let newer = folder.0.join("newer");
        collect(&root, &newer).unwrap();
        assert_eq!(fs::read(newer.join(kernel::NAME)).unwrap(), b"kernel");
        fs::remove_file(modules.join("vmlinuz")).unwrap();
        let error = collect(&root, &made).unwrap_err().to_string();
        assert!(error.contains("it has no /boot/vmlinuz-VERSION (of newer kernels"), "{error}");
    }
}
