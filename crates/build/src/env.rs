//! Values of instructions, with variables in them.

use std::collections::BTreeMap;

/// Longest value that variables may make of one that was short.
const MAX_VALUE: usize = 128 << 10;

/// `text` with `$NAME`, `${NAME}`, `${NAME:-WORD}` and `${NAME:+WORD}` replaced by what `get` has, as in
/// [Dockerfiles](https://docs.docker.com/reference/dockerfile/#environment-replacement); `\$` is a dollar. What is not known is empty.
pub(crate) fn expand(text: &str, get: Get<'_>) -> String {
    expand_at(text, get, false, 0)
}

/// What is known by a name.
type Get<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The same for a text that is expanded once more elsewhere: what is not known here stays as it is, and what is put in means
/// itself there.
pub(crate) fn expand_known(text: &str, get: Get<'_>) -> String {
    expand_at(text, &|name| get(name).map(|v| literal(&v)), true, 0)
}

/// A text that [`expand`] leaves as it is now.
pub(crate) fn literal(text: &str) -> String {
    text.replace('$', "\\$")
}

fn expand_at(text: &str, get: Get<'_>, keep: bool, depth: usize) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['$', '\\']) {
        out.push_str(&rest[..at]);
        if out.len() > MAX_VALUE {
            break;
        }
        let after = &rest[at + 1..];
        if rest.as_bytes()[at] == b'\\' {
            if let Some(next) = after.strip_prefix('$') {
                out.push_str(if keep { "\\$" } else { "$" });
                rest = next;
            } else {
                out.push('\\');
                rest = after;
            }
            continue;
        }
        if let Some(inner) = after.strip_prefix('{')
            && let Some(end) = closing(inner)
        {
            match braced(&inner[..end], get, keep, depth) {
                Some(value) => out.push_str(&value),
                None => out.push_str(&rest[at..at + end + 3]),
            }
            rest = &inner[end + 1..];
            continue;
        }
        let end = name_len(after);
        if end == 0 {
            out.push('$');
        } else {
            match get(&after[..end]) {
                None if keep => out.push_str(&rest[at..at + 1 + end]),
                value => out.push_str(&value.unwrap_or_default()),
            }
        }
        rest = &after[end..];
    }
    out.push_str(rest);
    let mut end = out.len().min(MAX_VALUE);
    while !out.is_char_boundary(end) {
        end -= 1;
    }
    out.truncate(end);
    out
}

fn name_len(text: &str) -> usize {
    let digit_first = text.starts_with(|c: char| c.is_ascii_digit());
    if digit_first {
        return 0;
    }
    text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len())
}

/// Where the brace that is open closes.
fn closing(text: &str) -> Option<usize> {
    let mut open = 1;
    for (at, c) in text.char_indices() {
        match c {
            '{' => open += 1,
            '}' => open -= 1,
            _ => {}
        }
        if open == 0 {
            return Some(at);
        }
    }
    None
}

/// None if it is to stay as it is.
fn braced(inner: &str, get: Get<'_>, keep: bool, depth: usize) -> Option<String> {
    const MAX_DEPTH: usize = 10;
    let end = name_len(inner);
    let (name, rest) = inner.split_at(end);
    let value = get(name);
    if keep && value.is_none() {
        return None;
    }
    let value = value.filter(|v| !v.is_empty());
    let word = |w: &str| if depth < MAX_DEPTH { expand_at(w, get, keep, depth + 1) } else { String::new() };
    Some(match (rest.strip_prefix(":-"), rest.strip_prefix(":+")) {
        (Some(default), _) => value.unwrap_or_else(|| word(default)),
        (_, Some(other)) => value.map(|_| word(other)).unwrap_or_default(),
        _ => value.unwrap_or_default(),
    })
}

/// What is known by name, later maps first.
pub(crate) fn lookup(maps: &[&BTreeMap<String, String>], name: &str) -> Option<String> {
    maps.iter().find_map(|m| m.get(name).cloned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn variables_are_replaced_as_in_dockerfiles() {
        let known = BTreeMap::from([("A".to_owned(), "1".to_owned()), ("PATH".into(), "/bin".into())]);
        let of = |t: &str| expand(t, &|n| lookup(&[&known], n));
        assert_eq!(of("/x:$PATH"), "/x:/bin");
        assert_eq!(of("${A}b$A.c"), "1b1.c");
        assert_eq!(of("${B:-no}${A:-no}${A:+yes}${B:+yes}"), "no1yes");
        assert_eq!(of("${B:-${A}x}"), "1x");
        assert_eq!(of(r"\$A \n $ $1 ${A"), r"$A \n $ $1 ${A");
        assert_eq!(of("$B$"), "$");
    }

    #[test]
    fn what_is_not_known_yet_is_left_for_later() {
        let known = BTreeMap::from([("A".to_owned(), "$1".to_owned())]);
        let of = |t: &str| expand_known(t, &|n| lookup(&[&known], n));
        assert_eq!(of(r"$A:${A}:$B:${B}:${B:-x}:${A:-x}:\$C"), r"\$1:\$1:$B:${B}:${B:-x}:\$1:\$C");
        // And then as if it had been done at once.
        let all = BTreeMap::from([("A".to_owned(), "$1".to_owned()), ("B".into(), "2".into())]);
        for text in [r"/x:$A:$B", r"${B:-$A}\$B", "${C:-${A}x}${B:+y}", "$C-${C}"] {
            let at_once = expand(text, &|n| lookup(&[&all], n));
            assert_eq!(expand(&of(text), &|n| lookup(&[&all], n)), at_once, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken(text in "[$\\\\{}:A-C+ -]{0,40}") {
            let known = BTreeMap::from([("A".to_owned(), "$A${A}".to_owned())]);
            expand(&text, &|n| lookup(&[&known], n));
            expand_known(&text, &|n| lookup(&[&known], n));
        }
    }
}
