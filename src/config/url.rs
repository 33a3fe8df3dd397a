//! Takes a `postgresql://` URL apart into the keys of an engine's section.
//!
//! Invariant: no problem repeats a part of the URL that may be a password.

use toml::Value;

/// libpq's names and ours, where they differ.
const ALIASES: [(&str, &str); 8] = [
    ("dbname", "database"),
    ("sslmode", "ssl_mode"),
    ("sslrootcert", "ssl_root_cert"),
    ("sslcert", "ssl_cert"),
    ("sslkey", "ssl_key"),
    ("sslnegotiation", "ssl_negotiation"),
    ("keepalives_count", "keepalives_retries"),
    ("passfile", "password_file"),
];

/// Keys whose value libpq gives in seconds, and in milliseconds.
const SECONDS: [&str; 3] = ["connect_timeout", "keepalives_idle", "keepalives_interval"];
const MILLISECONDS: [&str; 1] = ["tcp_user_timeout"];

/// The keys a URL sets, in its order.
pub(super) fn parts(url: &str) -> Result<Vec<(String, Value)>, String> {
    let rest = ["postgresql://", "postgres://"].iter().find_map(|scheme| url.strip_prefix(scheme));
    let rest = rest.ok_or("must start with postgresql://")?;
    let (rest, parameters) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let (login, hosts) = authority.split_once('@').unwrap_or(("", authority));
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    let mut parts = Vec::new();
    for (key, text) in [("user", user), ("password", password), ("database", database)] {
        if !text.is_empty() {
            parts.push((key.to_owned(), decoded(text)?.into()));
        }
    }
    self::hosts(hosts, &mut parts)?;
    for parameter in parameters.split('&').filter(|parameter| !parameter.is_empty()) {
        self::parameter(parameter, &mut parts)?;
    }
    Ok(parts)
}

/// `host:port,host:port`; an IPv6 address stands in brackets.
fn hosts(text: &str, parts: &mut Vec<(String, Value)>) -> Result<(), String> {
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in text.split(',').filter(|host| !host.is_empty()) {
        let (name, port) = match host.strip_prefix('[').and_then(|host| host.split_once(']')) {
            Some((address, "")) => (address, None),
            Some((address, port)) => (address, port.strip_prefix(':')),
            None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
        };
        names.push(Value::from(decoded(name)?));
        ports.push(Value::from(port.unwrap_or("5432")));
    }
    if !names.is_empty() {
        parts.push(("host".into(), names.into()));
        parts.push(("port".into(), ports.into()));
    }
    Ok(())
}

fn parameter(text: &str, parts: &mut Vec<(String, Value)>) -> Result<(), String> {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    if !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
        // It may be the tail of a password with a "?" in it.
        return Err("has a ? that no parameter follows: write %3F in a user or password".into());
    }
    let key = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, key)| key);
    let value = decoded(value)?;
    if key == "options" {
        return options(&value, parts);
    }
    let number = value.bytes().all(|byte| byte.is_ascii_digit());
    let value = match key {
        _ if number && SECONDS.contains(&key) => format!("{value}s"),
        _ if number && MILLISECONDS.contains(&key) => format!("{value}ms"),
        _ => value,
    };
    parts.push((key.to_owned(), value.into()));
    Ok(())
}

/// libpq's `options`: only settings, `-c name=value` or `--name=value`, a backslash before what is not to split.
fn options(text: &str, parts: &mut Vec<(String, Value)>) -> Result<(), String> {
    let problem = "has options other than -c name=value and --name=value";
    let mut words = vec![String::new()];
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => words.last_mut().expect("there is always one").extend(chars.next()),
            c if c.is_ascii_whitespace() || c == '\x0b' => words.push(String::new()),
            c => words.last_mut().expect("there is always one").push(c),
        }
    }
    let mut settings = toml::Table::new();
    let mut words = words.into_iter().filter(|word| !word.is_empty());
    while let Some(word) = words.next() {
        let setting = match word.strip_prefix("--").or_else(|| word.strip_prefix("-c")) {
            Some("") => words.next().ok_or(problem)?,
            Some(setting) => setting.to_owned(),
            None => return Err(problem.into()),
        };
        let (name, value) = setting.split_once('=').ok_or(problem)?;
        if settings.insert(name.to_owned(), value.into()).is_some() {
            return Err(format!("sets {name} twice in its options"));
        }
    }
    parts.push(("server_settings".into(), settings.into()));
    Ok(())
}

fn decoded(text: &str) -> Result<String, String> {
    let problem = || "has a % that two hexadecimal digits do not follow: write %25".to_owned();
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next().ok_or_else(problem)?, rest.next().ok_or_else(problem)?];
            let digits =
                std::str::from_utf8(&digits).ok().filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
            bytes.push(digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).ok_or_else(problem)?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).map_err(|_| "is not UTF-8 once its % are decoded".to_owned())
}
