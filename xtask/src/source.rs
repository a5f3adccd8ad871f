//! Reading Rust source without a parser: what is code and what is comment or text.

/// The source with comments, strings and character literals blanked out. Every line keeps its
/// number and every other character its column.
pub(crate) fn code_only(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while at < chars.len() {
        let end = token_end(&chars, at);
        match end {
            Some(end) => {
                let blank = |c: &char| if *c == '\n' { '\n' } else { ' ' };
                out.extend(chars[at..end].iter().map(blank));
                at = end;
            }
            None => {
                out.push(chars[at]);
                at += 1;
            }
        }
    }
    out
}

/// Where the comment or literal that begins at `at` ends; `None` when none begins there.
fn token_end(chars: &[char], at: usize) -> Option<usize> {
    let rest = &chars[at..];
    match rest {
        ['/', '/', ..] => Some(at + find(rest, |r| r[0] == '\n').unwrap_or(rest.len())),
        ['/', '*', ..] => Some(at + block_comment(rest)),
        ['"', ..] => Some(at + quoted(rest, '"')),
        ['r', '"' | '#', ..] if !follows_word(chars, at) => raw_string(rest).map(|n| at + n),
        ['b' | 'c', 'r', '"' | '#', ..] if !follows_word(chars, at) => {
            raw_string(&rest[1..]).map(|n| at + 1 + n)
        }
        // A lifetime has no closing quote right after its one character.
        ['\'', '\\', ..] => Some(at + quoted(rest, '\'')),
        ['\'', _, '\'', ..] => Some(at + 3),
        _ => None,
    }
}

fn find(chars: &[char], matches: impl Fn(&[char]) -> bool) -> Option<usize> {
    (0..chars.len()).find(|&i| matches(&chars[i..]))
}

fn follows_word(chars: &[char], at: usize) -> bool {
    at > 0 && is_word(chars[at - 1])
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn block_comment(rest: &[char]) -> usize {
    let (mut depth, mut i) = (0, 0);
    while i < rest.len() {
        match rest[i..] {
            ['/', '*', ..] => (depth, i) = (depth + 1, i + 2),
            ['*', '/', ..] => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

fn quoted(rest: &[char], quote: char) -> usize {
    let mut i = 1;
    while i < rest.len() && rest[i] != quote {
        i += if rest[i] == '\\' { 2 } else { 1 };
    }
    (i + 1).min(rest.len())
}

/// `None` for a raw identifier such as `r#type`.
fn raw_string(rest: &[char]) -> Option<usize> {
    let hashes = rest[1..].iter().take_while(|c| **c == '#').count();
    if rest.get(1 + hashes) != Some(&'"') {
        return None;
    }
    let body = &rest[2 + hashes..];
    let closes =
        |r: &[char]| r[0] == '"' && r.len() > hashes && r[1..=hashes].iter().all(|c| *c == '#');
    Some(find(body, closes).map_or(rest.len(), |n| 2 + hashes + n + 1 + hashes))
}

/// The numbers, from 1, of the lines that hold `word` as a whole word.
pub(crate) fn lines_with_word<'a>(
    code: &'a str,
    word: &'a str,
) -> impl Iterator<Item = usize> + 'a {
    code.lines().enumerate().filter(move |(_, line)| has_word(line, word)).map(|(i, _)| i + 1)
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        // A macro's name ends in `!`, which ends the word by itself.
        let after = line[at + word.len()..].chars().next().filter(|_| !word.ends_with('!'));
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_lines_stay() {
        let source =
            "a // unsafe\nb /* unsafe /* x */\nunsafe */ c \"unsafe \\\" x\" d\n'\\'' e '\"' f";
        let code = code_only(source);
        assert_eq!(code.lines().count(), source.lines().count());
        assert!(!code.contains("unsafe"));
        for kept in ["a", "b", "c", "d", "e", "f"] {
            assert_eq!(code.matches(kept).count(), 1, "{kept} in {code:?}");
        }
    }

    #[test]
    fn raw_strings_lifetimes_and_raw_identifiers() {
        let code = code_only("r#\"unsafe \" x\"# k br\"unsafe\" &'a str r#type unsafe");
        assert_eq!(lines_with_word(&code, "unsafe").count(), 1);
        assert!(code.contains("&'a str r#type unsafe"));
    }

    #[test]
    fn words_are_whole() {
        assert!(has_word("unsafe {", "unsafe"));
        assert!(!has_word("forbid(unsafe_code)", "unsafe"));
        assert!(has_word("x = todo!()", "todo!"));
        assert!(!has_word("my_todo!()", "todo!"));
    }
}
