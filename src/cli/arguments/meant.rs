//! Hints for options and commands that there are not: the one that is spelled alike, or the one that does what goes by
//! this name in other programs.

use std::ffi::{OsStr, OsString};

use super::ctl;
use crate::spelling;

/// The options here, and the names of the same options in other monitors and container tools. An option is told where the
/// command has it. This and the next ones are texts, as each reference in a table is one more for the loader to write.
const OPTIONS: &str = "\
--cmdline: -a --append --args --boot-args --params
--cpus: -c --smp --cores --vcpu-count
--memory: -m --mem --ram --size --mem-size-mib
--initrd: -i --initramfs --ramdisk
--disk: -d --hda --drive --block --image
--rootfs: --root
--net: -n --nic --netdev --tap
--console: --tty
--entropy: --rng --random
--vsock: --cid
--publish: -p
--port: --serial-port --chardev
--env: -e
--user: -u
--workdir: -w --cwd
--id: --name
--api-sock: -s --sock --socket
--level: --log-level
--log-path: --log --log-file
";

/// The commands here, some of which are two words, and their names in other programs.
const COMMANDS: &str = "\
run: boot create launch
serve: daemon server
ctl list: ls ps
ctl list --watch: top
ctl stop --force: kill
run --restore: restore
exec: ssh shell
check: lint validate
";

/// The commands of `alula ctl`, and the names of other programs' commands for a running guest.
const CTL_COMMANDS: &str = "\
status: stat info show
list: ls ps
list --watch: top
metrics: stats
stop --force: kill
snapshot: save
pause: suspend
resume: unpause continue
shutdown: halt poweroff
reset: reboot restart
put: post
";

/// The words of a text like those above, and what each belongs to: of those, the names in other programs, and what each
/// is here.
pub fn names(others: &'static str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let lines = others.lines().filter_map(|line| line.split_once(": "));
    lines.flat_map(|(meant, names)| names.split(' ').map(move |name| (name, meant)))
}

/// The name here of the option or command that other programs call `word`.
fn other(word: &str, others: &'static str) -> Option<&'static str> {
    names(others).find(|(name, _)| *name == word).map(|(_, meant)| meant)
}

/// `message`, and what was meant by `word`: what goes by its name elsewhere, or the one of `words` that is most like it.
pub fn with_hint<'w>(
    message: String,
    word: &str,
    others: &'static str,
    words: impl IntoIterator<Item = &'w str>,
) -> String {
    match other(word, others) {
        Some(meant) => format!("{message} (is `{meant}` meant?)"),
        None => spelling::with_hint(message, word, words),
    }
}

/// The message about a command that there is not; `commands` are those that there are.
pub fn no_command<'w>(word: &OsStr, commands: impl IntoIterator<Item = &'w str>) -> String {
    let message = format!("there is no command {word:?}");
    let word = word.to_string_lossy();
    // Commands for a running guest are those of `ctl`.
    if ctl::is_command(&word) {
        return format!("{message} (is `alula ctl {word}` meant?)");
    }
    with_hint(message, &word, COMMANDS, commands)
}

/// The message about `words` of which none is a command of `alula ctl` in its place. A guest's name may come first.
pub fn no_ctl_command(words: &[&str]) -> String {
    let hint = |word: &&str| {
        let message = format!("there is no command `{word}`");
        let hinted = with_hint(message.clone(), word, CTL_COMMANDS, ctl::commands());
        (hinted != message).then_some(hinted)
    };
    match words {
        [first, ..] if ctl::is_command(first) => format!("`{first}` has too many words, or too few"),
        [first] => hint(first).unwrap_or_else(|| {
            format!(
                "there is no command `{first}`: if a guest is called so, what to ask it is missing, as in \
                 `alula ctl {first} status`"
            )
        }),
        [first, second, ..] => [second, first]
            .into_iter()
            .find_map(hint)
            .unwrap_or_else(|| format!("there is no command `{second}`, and none `{first}`")),
        [] => "a command is missing".to_owned(),
    }
}

/// The message about what is wrong with `arguments`: with what of the command's `help` was meant, if it is about an
/// option or a word that there is not.
pub fn with_word(error: &lexopt::Error, arguments: &[OsString], help: &str) -> String {
    match error {
        lexopt::Error::UnexpectedOption(option) => with_option(option, arguments, help),
        lexopt::Error::UnexpectedArgument(word) => {
            // Of `Usage: alula kernel fetch [--from URL|FILE]...`, what is written as it stands: `fetch`.
            let usage = help
                .lines()
                .filter(|line| line.contains("alula "))
                .flat_map(|line| line.split_whitespace().skip_while(|word| *word != "alula").skip(2));
            let words = usage.map(|word| word.trim_matches(['[', ']']));
            let words = words.filter(|word| word.bytes().all(|letter| letter.is_ascii_lowercase()));
            let (word, words) = (word.to_string_lossy(), words.collect::<Vec<_>>());
            // A word of an example is as it should be, and only in the wrong place.
            let words = if words.contains(&&*word) { Vec::new() } else { words };
            spelling::with_hint(error.to_string(), &word, words)
        }
        _ => error.to_string(),
    }
}

fn with_option(option: &str, arguments: &[OsString], help: &str) -> String {
    // Where other programs have words after one hyphen, only the first letter is told.
    let is_whole = |word: &&str| word.len() > 2 && !word.starts_with("--") && word.starts_with(option);
    let whole = arguments.iter().filter_map(|word| word.to_str()).find(is_whole).unwrap_or(option);
    let message = format!("invalid option '{whole}'");
    // What stands before the description, in the lines that describe options.
    let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    let heads = lines.map(|line| line.split("  ").next().unwrap_or_default());
    let words = heads.flat_map(|head| head.split([' ', ',', '[', '=']));
    let options: Vec<_> = words.filter(|word| word.starts_with("--")).collect();
    let is_letter = whole.len() == 2;
    let hyphen = if is_letter || whole.starts_with("--") { "" } else { "-" };
    let word = format!("{hyphen}{whole}");
    match other(&word, OPTIONS).filter(|meant| options.contains(meant)) {
        Some(meant) => format!("{message} (is `{meant}` meant?)"),
        // One letter is like each other letter.
        None if is_letter => message,
        None => spelling::with_hint(message, &word, options),
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    fn refused(line: &str) -> String {
        parse(line.split_whitespace().map(OsString::from)).expect_err(line)
    }

    #[test]
    fn words_of_other_programs_are_told_by_their_names_here() {
        for (line, meant) in [
            ("alula run -m 512", "--memory"),
            ("alula run -smp 2", "--cpus"),
            ("alula run --smp 2", "--cpus"),
            ("alula run --vcpus 2", "--cpus"),
            ("alula run --mem 1G", "--memory"),
            ("alula run -memory 1G", "--memory"),
            ("alula run -append x", "--cmdline"),
            ("alula run --drive a", "--disk"),
            ("alula run --tap tap0", "--net"),
            ("alula run --name a", "--id"),
            ("alula serve --socket s", "--api-sock"),
            ("alula serve --name s", "--id"),
            ("alula exec -u root web id", "--user"),
            ("alula exec --cwd / web ls", "--workdir"),
            ("alula exec --usr root web id", "--user"),
            ("alula ctl --jsn status", "--json"),
            ("alula ctl --socket s status", "--api-sock"),
            ("alula cp --sock s a :b", "--api-sock"),
            ("alula wait --time 3 a", "--timeout"),
            ("alula clone --coun 3 a", "--count"),
            ("alula snapshot --memory a", "--memory-path"),
            ("alula jail --user 3", "--userns"),
            ("alula boot", "run"),
            ("alula restore", "run --restore"),
            ("alula stop web", "alula ctl stop"),
            ("alula list", "alula ctl list"),
            ("alula ps", "ctl list"),
            ("alula snapshott", "snapshot"),
            ("alula ctl kill", "stop --force"),
            ("alula ctl web poweroff", "shutdown"),
            ("alula ctl stat", "status"),
            ("alula snapshot inspct a", "inspect"),
            ("alula kernel fech", "fetch"),
            ("alula cache clean", "clear"),
            ("firecracker --config f", "--config-file"),
            ("firecracker --socket s", "--api-sock"),
            ("jailer --exec f", "--exec-file"),
            ("snapshot-editor edit-memry", "edit-memory"),
            ("snapshot-editor edit-memory rebase --memory-pth a", "--memory-path"),
        ] {
            let error = refused(line);
            assert!(error.contains(&format!("is `{meant}` meant?")), "{line}: {error}");
        }
    }

    #[test]
    fn what_is_like_nothing_gets_no_hint_and_only_options_are_told() {
        for line in [
            "alula run -z",
            "alula run --frobnicate",
            "alula exec -m 1 web id",
            "alula check --cpus",
            "alula dance",
            "alula ctl dance",
            "alula ctl web dance",
        ] {
            let error = refused(line);
            assert!(!error.contains("meant?"), "{line}: {error}");
        }
    }

    #[test]
    fn a_command_that_is_not_after_its_hyphens_is_told_where_it_goes() {
        for (line, word) in [
            ("alula run vmlinux sh", "sh"),
            ("alula run vmlinux --rootfs root sh -c true", "sh"),
            ("alula run --kernel vmlinux make", "make"),
        ] {
            let error = refused(line);
            let expected = format!(
                "unexpected argument {word:?}: a kernel was named, and a command to run in the guest goes after `--`;"
            );
            assert!(error.starts_with(&expected), "{line}: {error}");
        }
        for line in ["alula cache clear clear", "alula kernel fetch fetch"] {
            let error = refused(line);
            assert!(error.contains("unexpected argument") && !error.contains("meant?"), "{line}: {error}");
        }
    }

    #[test]
    fn words_that_no_command_of_ctl_has_are_named() {
        for (line, expected) in [
            ("alula ctl x frob", "there is no command `frob`, and none `x`; see"),
            (
                "alula ctl frob",
                "there is no command `frob`: if a guest is called so, what to ask it is missing, as in `alula ctl frob status`; see",
            ),
            ("alula ctl x status now", "`status` has too many words, or too few; see"),
            ("alula ctl status now", "`status` has too many words, or too few; see"),
        ] {
            let error = refused(line);
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn what_is_told_is_there() {
        let help = |line: &str| match parse(line.split_whitespace().map(OsString::from)) {
            Ok(super::super::Command::Print(help)) => help,
            other => panic!("{line}: {other:?}"),
        };
        let options =
            ["run", "exec", "serve"].map(|command| help(&format!("alula {command} --help"))).concat();
        for (name, meant) in names(OPTIONS) {
            assert!(options.contains(&format!("{meant} ")), "{name}: {meant}");
        }
        let commands = help("alula --help");
        for (name, meant) in names(COMMANDS) {
            let first = meant.split(' ').next().unwrap();
            assert!(commands.contains(&format!("\n  {first} ")), "{name}: {meant}");
        }
        for (name, meant) in names(CTL_COMMANDS) {
            assert!(ctl::is_command(meant.split(' ').next().unwrap()), "{name}: {meant}");
            assert!(!ctl::is_command(name), "{name} is there");
        }
    }
}
