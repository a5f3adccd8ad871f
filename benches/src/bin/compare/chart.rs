//! Bar charts of a comparison, as SVG.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

use crate::load::LOADS;
use crate::report::{Report, Row};
use crate::stacks::Group;

const WIDTH: u32 = 860;
const BAR: u32 = 26;
const LEFT: i32 = 330;
const RIGHT: i32 = 110;
const TOP: i32 = 48;

/// A file for each group and load, such as `files-write32.svg`.
pub(crate) fn draw(report: &Report, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for group in Group::ALL {
        let prefix = if group == Group::Memory { "memory" } else { "files" };
        for load in LOADS {
            let of = |row: &&Row| row.stack.group == group && row.load.name == load.name;
            let rows: Vec<&Row> = report.rows.iter().filter(of).collect();
            if rows.is_empty() {
                continue;
            }
            let path = dir.join(format!("{prefix}-{}.svg", load.name));
            let title = format!("{}, {}: IOPS", load.title, group.title());
            bars(&path, &title, &rows)
                .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        }
    }
    Ok(())
}

/// Where the cairn rows differ from the others: in their colour.
fn bars(path: &Path, title: &str, rows: &[&Row]) -> Result<(), Box<dyn std::error::Error>> {
    let height = u32::try_from(rows.len())? * BAR + u32::try_from(TOP)? + 12;
    let root = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
    root.draw(&Text::new(title.to_owned(), (12, 14), text(17)))?;
    let most = rows.iter().map(|row| row.median.iops).fold(1.0, f64::max);
    let room = f64::from(i32::try_from(WIDTH)? - LEFT - RIGHT);
    for (at, row) in (0..).zip(rows) {
        let y = TOP + at * i32::try_from(BAR)?;
        #[expect(clippy::cast_possible_truncation, reason = "pixels of a chart of this width")]
        let end = LEFT + (row.median.iops / most * room).round() as i32;
        let ours = row.stack.title.starts_with("cairn");
        let colour = if ours { RGBColor(31, 119, 180) } else { RGBColor(170, 170, 170) };
        root.draw(&Rectangle::new([(LEFT, y), (end, y + 18)], colour.filled()))?;
        root.draw(&Text::new(row.stack.title, (12, y + 3), text(13)))?;
        root.draw(&Text::new(format!("{:.0}", row.median.iops), (end + 6, y + 3), text(13)))?;
    }
    root.present()?;
    Ok(())
}
