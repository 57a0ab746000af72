//! Tables for people: columns as wide as what is in them, and figures in units that can be read.

use std::time::Duration;

/// The side of its column at which a cell stands.
#[derive(Clone, Copy)]
pub enum Align {
    Left,
    Right,
}

/// A head and rows as lines; two spaces are between columns.
pub fn text<const N: usize>(
    head: [&str; N],
    align: [Align; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let rows: Vec<_> = [head.map(str::to_owned)].into_iter().chain(rows).collect();
    let mut widths = [0; N];
    for row in &rows {
        widths.iter_mut().zip(row).for_each(|(width, cell)| *width = (*width).max(cell.chars().count()));
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for ((cell, width), align) in row.iter().zip(widths).zip(align) {
            match align {
                Align::Left => line += &format!("{cell:<width$}  "),
                Align::Right => line += &format!("{cell:>width$}  "),
            }
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// Bytes, in the unit in which they are 1 to 1024.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut tenths = u128::from(bytes) * 10 / 1024;
    for unit in UNITS {
        match tenths {
            0..100 => return format!("{}.{} {unit}", tenths / 10, tenths % 10),
            100..10_240 => return format!("{} {unit}", tenths / 10),
            _ => tenths /= 1024,
        }
    }
    format!("{} EiB", tenths / 10)
}

/// A time, by its two largest units.
pub fn time(time: Duration) -> String {
    let seconds = time.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}.{} s", time.subsec_millis() / 100),
        60..3600 => format!("{minutes} min {} s", seconds % 60),
        3600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a", "1"], ["longer", "100"]].map(|row| row.map(str::to_owned));
        assert_eq!(
            text(["NAME", "N"], [Align::Left, Align::Right], rows),
            "NAME      N\na         1\nlonger  100\n"
        );
    }

    #[test]
    fn figures_have_units_that_can_be_read() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (10 << 10, "10 KiB"),
            ((1 << 20) - 1, "1023 KiB"),
            (45 << 20, "45 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "15 EiB"),
        ] {
            assert_eq!(size(bytes), expected, "{bytes}");
        }
        for (ms, expected) in [
            (0, "0.0 s"),
            (59_990, "59.9 s"),
            (61_000, "1 min 1 s"),
            (7_260_000, "2 h 1 min"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(time(Duration::from_millis(ms)), expected, "{ms}");
        }
    }
}
