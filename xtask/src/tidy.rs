//! Checks of the repository's own rules.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

use crate::source::{code_only, lines_with_word};

/// The arrows between crates, and no others. `*` allows all.
const ARROWS: &[(&str, &[&str])] = &[
    ("cairn-block", &[]),
    ("cairn-reactor", &["cairn-block"]),
    ("cairn-nvmf", &["cairn-block"]),
    ("cairn-iscsi", &["cairn-block"]),
    ("cairn-nexus", &["cairn-block"]),
    ("cairn-replica", &["cairn-block"]),
    ("cairn-crypt", &["cairn-block"]),
    (
        "cairn-engine",
        &[
            "cairn-nvmf",
            "cairn-iscsi",
            "cairn-nexus",
            "cairn-replica",
            "cairn-crypt",
            "cairn-reactor",
            "cairn-block",
        ],
    ),
    ("cairn-sim", &["cairn-engine", "cairn-block"]),
    ("cairn-api", &[]),
    ("cairn-control", &["cairn-api"]),
    ("cairn-csi", &["cairn-api"]),
    ("cairn", &["*"]),
    ("cairn-benches", &["*"]),
    ("cairn-fuzz", &["*"]),
    ("cairn-tests", &[]),
    ("cairn-nemesis", &["cairn-engine", "cairn-sim", "cairn-api"]),
    ("xtask", &[]),
];

/// Crates that decide and touch nothing. Their clippy.toml keeps the standard library's clock, files,
/// threads and sockets out; this check keeps out the packages that would bring others.
const PURE: [&str; 6] =
    ["cairn-block", "cairn-nvmf", "cairn-iscsi", "cairn-nexus", "cairn-replica", "cairn-crypt"];

/// What a pure crate may not depend on.
const IMPURE: [&str; 14] = [
    "async-std",
    "crossbeam",
    "fastrand",
    "getrandom",
    "io-uring",
    "libc",
    "mio",
    "nix",
    "parking_lot",
    "rand",
    "rustix",
    "socket2",
    "tokio",
    "tokio-uring",
];

/// The only crate that may hold `unsafe`.
const UNSAFE_CRATE: &str = "cairn-reactor";

/// A source file past the first is worth a look, past the second is refused.
const LONG_FILE: usize = 1_000;
const TOO_LONG_FILE: usize = 1_200;

/// Left behind by unfinished work.
const LEFTOVERS: [&str; 3] = ["todo!", "unimplemented!", "dbg!"];

/// What is not ours, or is made by a build or a run.
const SKIPPED_DIRS: [&str; 5] = ["target", ".git", ".cache", "cairn-data", "node_modules"];

/// One broken rule.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    file: PathBuf,
    line: usize,
    what: String,
    remedy: &'static str,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file, line) = (self.file.display(), self.line);
        write!(f, "{file}:{line}: {}\n    -> {}", self.what, self.remedy)
    }
}

/// Checks the repository that holds the current directory; whether all is well.
pub(crate) fn run() -> Result<bool> {
    let metadata = MetadataCommand::new().no_deps().exec().context("cargo metadata failed")?;
    let root = metadata.workspace_root.as_std_path();
    let mut files = Vec::new();
    walk(root, &mut files)?;
    files.sort();

    let mut findings = arrows(&metadata)?;
    findings.extend(forbids(&metadata)?);
    let reactor = metadata.packages.iter().find(|p| p.name.as_str() == UNSAFE_CRATE);
    let reactor = reactor.and_then(|p| p.manifest_path.parent()).map(|p| p.as_std_path());
    let mut sources = 0;
    for file in files.iter().filter(|f| has_extension(f, "rs")) {
        sources += 1;
        let text = fs::read_to_string(file)?;
        let may_be_unsafe = reactor.is_some_and(|dir| file.starts_with(dir));
        findings.extend(rust_source(file, &text, may_be_unsafe));
    }
    let pages: Vec<_> = files.iter().filter(|f| has_extension(f, "md")).collect();
    let mut anchors = Anchors::default();
    for page in &pages {
        findings.extend(links(page, &fs::read_to_string(page)?, &mut anchors));
    }

    for finding in &mut findings {
        if let Ok(relative) = finding.file.strip_prefix(root) {
            finding.file = relative.to_owned();
        }
        println!("{finding}");
    }
    println!(
        "tidy: {} crates, {sources} source files, {} pages: {} findings",
        metadata.packages.len(),
        pages.len(),
        findings.len()
    );
    Ok(findings.is_empty())
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e == extension)
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_dir() {
            if !SKIPPED_DIRS.iter().any(|s| entry.file_name() == *s) {
                walk(&path, files)?;
            }
        } else if kind.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

fn arrows(metadata: &Metadata) -> Result<Vec<Finding>> {
    let members: BTreeSet<&str> = metadata.packages.iter().map(|p| p.name.as_str()).collect();
    let mut findings = Vec::new();
    for package in &metadata.packages {
        let manifest = package.manifest_path.as_std_path();
        let text = fs::read_to_string(manifest)?;
        let mut add = |line, what, remedy| {
            findings.push(Finding { file: manifest.to_owned(), line, what, remedy });
        };
        if !ARROWS.iter().any(|(name, _)| *name == package.name.as_str()) {
            add(
                1,
                format!("crate {} has no row in the list of arrows", package.name),
                "decide what it may depend on and add it to ARROWS in xtask/src/tidy.rs",
            );
            continue;
        }
        let deliberate = ["mutants", "nemesis"];
        let named = |features: &[String]| features.iter().any(|f| deliberate.contains(&f.as_str()));
        let by_default = package.features.get("default").is_some_and(|features| named(features));
        if by_default || package.dependencies.iter().any(|d| named(&d.features)) {
            add(
                1,
                format!("crate {} turns deliberate bugs on in every build", package.name),
                "only whoever builds for the simulator or the nemesis names these features",
            );
        }
        let line_of = |name: &str| text.lines().position(|l| l.contains(name)).map_or(1, |i| i + 1);
        if PURE.contains(&package.name.as_str()) {
            for banned in package
                .dependencies
                .iter()
                .filter(|d| d.kind == DependencyKind::Normal && IMPURE.contains(&d.name.as_str()))
            {
                add(
                    line_of(&banned.name),
                    format!("{} is pure and must not depend on {}", package.name, banned.name),
                    "take what it gives as an argument, or move the code to the engine",
                );
            }
            if !manifest.with_file_name("clippy.toml").exists() {
                add(
                    1,
                    format!("{} is pure and has no clippy.toml", package.name),
                    "copy nvmf/clippy.toml: it lists what pure code may not call",
                );
            }
        }
        for dependency in package.dependencies.iter().filter(|d| members.contains(d.name.as_str()))
        {
            if !arrow_allowed(&package.name, &dependency.name) {
                add(
                    line_of(&dependency.name),
                    format!("{} must not depend on {}", package.name, dependency.name),
                    "move the shared part down to a crate that both may use, or pass it in; the \
                     arrows are in docs/ARCHITECTURE.md",
                );
            }
        }
    }
    Ok(findings)
}

/// Development dependencies follow the same arrows: a pure crate's tests are pure too.
fn arrow_allowed(from: &str, to: &str) -> bool {
    let row = ARROWS.iter().find(|(name, _)| *name == from);
    row.is_some_and(|(_, allowed)| allowed.iter().any(|a| *a == "*" || *a == to))
}

fn forbids(metadata: &Metadata) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for package in metadata.packages.iter().filter(|p| p.name.as_str() != UNSAFE_CRATE) {
        for root in crate_roots(package) {
            let text = fs::read_to_string(&root)?;
            let code: String =
                code_only(&text).chars().filter(|c| !c.is_ascii_whitespace()).collect();
            if !code.contains("#![forbid(unsafe_code)]") {
                findings.push(Finding {
                    file: root,
                    line: 1,
                    what: format!("{} does not forbid unsafe code", package.name),
                    remedy: "add #![forbid(unsafe_code)] at the top",
                });
            }
        }
    }
    Ok(findings)
}

fn crate_roots(package: &Package) -> impl Iterator<Item = PathBuf> {
    let roots = package.targets.iter().filter(|t| t.is_lib() || t.is_bin());
    roots.map(|t| t.src_path.clone().into_std_path_buf())
}

fn rust_source(file: &Path, text: &str, may_be_unsafe: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |line, what, remedy| {
        findings.push(Finding { file: file.to_owned(), line, what, remedy });
    };
    let code = code_only(text);
    if !may_be_unsafe {
        for line in lines_with_word(&code, "unsafe") {
            add(
                line,
                "unsafe code outside engine/reactor".to_owned(),
                "use a safe call, or put the operation behind the Driver seam in engine/reactor",
            );
        }
    }
    for word in LEFTOVERS {
        for line in lines_with_word(&code, word) {
            add(line, format!("{word} is left in the code"), "finish it, or return an error");
        }
    }
    let length = text.lines().count();
    if length > TOO_LONG_FILE {
        add(
            length,
            format!("{length} lines, over {TOO_LONG_FILE}"),
            "it is probably two things: split it, and move long tests to foo/tests.rs",
        );
    } else if length > LONG_FILE {
        println!("note: {} has {length} lines, over {LONG_FILE}", file.display());
    }
    findings
}

/// The headings' anchors of pages already read.
#[derive(Debug, Default)]
struct Anchors(HashMap<PathBuf, BTreeSet<String>>);

impl Anchors {
    fn has(&mut self, page: &Path, anchor: &str) -> bool {
        let read = || fs::read_to_string(page).map(|t| headings(&t)).unwrap_or_default();
        self.0.entry(page.to_owned()).or_insert_with(read).contains(anchor)
    }
}

fn links(page: &Path, text: &str, anchors: &mut Anchors) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (line, target) in link_targets(text) {
        let outside = target.contains("://") || target.starts_with("mailto:");
        if outside || target.is_empty() {
            continue;
        }
        let (path, anchor) = target.split_once('#').unwrap_or((&target, ""));
        let dir = page.parent().unwrap_or(Path::new("."));
        let to = if path.is_empty() { page.to_owned() } else { dir.join(path) };
        if !path.is_empty() && !to.exists() {
            findings.push(Finding {
                file: page.to_owned(),
                line,
                what: format!("dead link: there is no {path}"),
                remedy: "correct the path (relative to this page) or take the link out",
            });
        } else if !anchor.is_empty() && has_extension(&to, "md") && !anchors.has(&to, anchor) {
            findings.push(Finding {
                file: page.to_owned(),
                line,
                what: format!("dead link: {} has no heading #{anchor}", to.display()),
                remedy: "use the heading's anchor: lower case, blanks as hyphens, no punctuation",
            });
        }
    }
    findings
}

/// The lines outside fenced code, numbered from 1, with inline code blanked out.
fn prose(text: &str) -> Vec<(usize, String)> {
    let (mut fence, mut lines) = (None, Vec::new());
    for (i, line) in text.lines().enumerate() {
        let start = line.trim_start();
        let mark = ["```", "~~~"].into_iter().find(|m| start.starts_with(m));
        match (fence, mark) {
            (None, Some(mark)) => fence = Some(mark),
            (Some(open), Some(mark)) if open == mark => fence = None,
            (Some(_), _) => {}
            (None, None) => lines.push((i + 1, without_inline_code(line))),
        }
    }
    lines
}

fn without_inline_code(line: &str) -> String {
    let parts: Vec<&str> = line.split('`').collect();
    let closed = parts.len() % 2 == 1;
    let keep = |(i, part): (usize, &&str)| match i % 2 {
        1 if closed => String::new(),
        _ => (*part).to_owned(),
    };
    parts.iter().enumerate().map(keep).collect()
}

/// Targets of `[text](target)` and of `[name]: target`.
fn link_targets(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in prose(text) {
        for (at, _) in line.match_indices("](") {
            let rest = &line[at + 2..];
            let target = rest.split([')', ' ']).next().unwrap_or_default();
            found.push((number, target.trim_matches(['<', '>']).to_owned()));
        }
        if line.starts_with('[')
            && !line.starts_with("[^")
            && let Some((_, target)) = line.split_once("]: ")
        {
            let target = target.split_whitespace().next().unwrap_or_default();
            found.push((number, target.trim_matches(['<', '>']).to_owned()));
        }
    }
    found
}

/// The anchors that a page's headings get on a forge.
fn headings(text: &str) -> BTreeSet<String> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut anchors = BTreeSet::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        let title = line.trim_start_matches('#');
        let level = line.len() - title.len();
        if fenced || level == 0 || level > 6 || !title.starts_with(' ') {
            continue;
        }
        let slug: String = title
            .trim()
            .to_lowercase()
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect();
        let count = seen.entry(slug.clone()).or_default();
        anchors.insert(if *count == 0 { slug } else { format!("{slug}-{count}") });
        *count += 1;
    }
    anchors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrows_hold_in_both_directions() {
        assert!(arrow_allowed("cairn-nexus", "cairn-block"));
        assert!(!arrow_allowed("cairn-nexus", "cairn-nvmf"));
        assert!(!arrow_allowed("cairn-block", "cairn-nexus"));
        assert!(!arrow_allowed("cairn-nexus", "cairn-sim"));
        assert!(arrow_allowed("cairn", "cairn-csi"));
        assert!(!arrow_allowed("cairn-tests", "cairn-block"));
    }

    #[test]
    fn leftovers_and_unsafe_are_found_with_their_line() {
        let text = "// todo!\nfn f() {\n    todo!()\n}\nunsafe fn g() {}\n";
        let lines = |unsafe_ok| {
            rust_source(Path::new("a.rs"), text, unsafe_ok)
                .iter()
                .map(|f| f.line)
                .collect::<Vec<_>>()
        };
        assert_eq!(lines(false), [5, 3]);
        assert_eq!(lines(true), [3]);
    }

    #[test]
    fn a_file_over_the_limit_is_refused() {
        let text = "x\n".repeat(TOO_LONG_FILE + 1);
        assert_eq!(rust_source(Path::new("a.rs"), &text, false).len(), 1);
    }

    #[test]
    fn links_in_prose_count_and_links_in_code_do_not() {
        let text = "[a](b.md#c) ![i](p.png \"t\") `[x](no)`\n```\n[y](no)\n```\n[r]: d.md\n";
        let targets: Vec<_> =
            link_targets(text).into_iter().map(|(n, t)| format!("{n} {t}")).collect();
        assert_eq!(targets, ["1 b.md#c", "1 p.png", "5 d.md"]);
    }

    #[test]
    fn anchors_are_those_of_a_forge() {
        let anchors = headings("# A page, with `code`\n## Same\n## Same\n```\n# no\n```\n");
        let wanted = ["a-page-with-code", "same", "same-1"].map(str::to_owned);
        assert_eq!(anchors, BTreeSet::from(wanted));
    }

    #[test]
    fn dead_links_are_found() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
        let text = "# Top\n[a](src/main.rs) [b](#top) [c](#gone) [d](no.md) [e](https://x.y/z)";
        let mut anchors = Anchors::default();
        anchors.0.insert(here.clone(), headings(text));
        let found: Vec<_> = links(&here, text, &mut anchors).into_iter().map(|f| f.what).collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("#gone") && found[1].contains("no.md"), "{found:?}");
    }
}
