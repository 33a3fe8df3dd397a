//! The command line's verbs for people: what goes on in a running broker, and statements through it.
//!
//! Knows the calls of `grpc::client` and nothing of the broker behind them. Invariants: a token comes from a file or
//! the environment, and is never an argument; what a broker said reaches a terminal escaped.

mod table;

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal, Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::{StringValueParser, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum};
use humantime::parse_duration;
use serde_json::{Value as Json, json};
use tokio::signal::ctrl_c;
use tokio::time::{Instant, sleep};

use crate::acceptor::Address;
use crate::grpc::client::{self, CallError, Client, Target, Tls};
use crate::grpc::pb;
use crate::secret::Secret;
use pb::execute_stream_response::Part;
use table::{Align, Cell, Format, Ink, Objects, RowWriter, Table, Tone, escape, pointed, short};

/// Holds a token where `--token-file` does not.
const TOKEN_VARIABLE: &str = "SESSION_BROKER_TOKEN";

/// The longest call when nothing else is said: longer than a broker takes to look for blockers or to end a session.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What is asked of a running broker.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List live sessions, and who stands in the way of whose statement.
    Sessions(Box<Sessions>),
    /// List the engines, their pools, and whether their PostgreSQL answers.
    Engines(Engines),
    /// Make the broker drain and stop, and wait until it is gone.
    Drain(Drain),
    /// Run a statement in a transaction of its own, and commit it.
    Exec(Box<Exec>),
}

/// List live sessions, and who stands in the way of whose statement.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Sessions {
    #[command(subcommand)]
    verb: Option<SessionsVerb>,
    #[command(flatten)]
    filter: Filter,
    /// Show them again every so many seconds, 2 unless said.
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        default_missing_value = "2",
        value_parser = clap::value_parser!(u64).range(1..=3600)
    )]
    watch: Option<u64>,
    /// How they are shown.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Subcommand)]
enum SessionsVerb {
    /// End a session: what runs is cancelled, and its transaction rolled back.
    Terminate(Terminate),
}

#[derive(Debug, Args)]
struct Terminate {
    /// The session's id, as listed.
    #[arg(value_name = "ID")]
    session_id: String,
    /// Why, for the broker's audit log.
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// How the answer is shown.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Filter {
    /// Only those of this caller.
    #[arg(long)]
    principal: Option<String>,
    /// Only those on this engine.
    #[arg(long)]
    engine: Option<String>,
    /// Only those with this profile.
    #[arg(long)]
    profile: Option<String>,
    /// Only those whose transaction stands so.
    #[arg(long, value_enum)]
    state: Option<StateFilter>,
    /// Only those with this label; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Only those that have not been used for longer, such as 10s.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    idle_longer_than: Option<Duration>,
    /// Only those whose transaction has been open for longer, such as 1m.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    transaction_longer_than: Option<Duration>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum StateFilter {
    Open,
    Failed,
    #[value(name = "none")]
    Without,
}

/// List the engines, their pools, and whether their PostgreSQL answers.
#[derive(Debug, Args)]
pub struct Engines {
    /// How they are shown.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
    #[command(flatten)]
    common: Common,
}

/// Make the broker drain and stop, and wait until it is gone.
#[derive(Debug, Args)]
pub struct Drain {
    /// How long live sessions may take to finish, up to the broker's drain_grace, which is the default.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    grace: Option<Duration>,
    /// How the answer is shown.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
    #[command(flatten)]
    common: Common,
}

/// Run a statement in a transaction of its own, and commit it.
#[derive(Debug, Args)]
pub struct Exec {
    /// The engine; the broker's default unless said.
    #[arg(long)]
    engine: Option<String>,
    /// The profile; the caller's first unless said.
    #[arg(long)]
    profile: Option<String>,
    /// The value of $1, of $2 and so on, in PostgreSQL's text form.
    #[arg(
        long = "parameter",
        value_name = "VALUE",
        allow_hyphen_values = true,
        value_parser = StringValueParser::new().map(Secret::new)
    )]
    parameters: Vec<Secret>,
    /// Have PostgreSQL refuse to write.
    #[arg(long)]
    read_only: bool,
    /// Fail, and commit nothing, when there are more rows.
    #[arg(long, value_name = "N")]
    max_rows: Option<u64>,
    /// Write the rows to this file, as csv or, with --output json, as a JSON object for each line.
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
    /// How the rows are shown; table unless said, and csv in a file.
    #[arg(long, value_enum)]
    output: Option<RowOutput>,
    /// One statement, $1, $2 and so on for parameters.
    sql: String,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RowOutput {
    Table,
    Json,
    Csv,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Color {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    Always,
    Never,
}

#[derive(Debug, Args)]
struct Common {
    /// Where the broker listens: HOST:PORT or unix:/PATH.
    #[arg(long, value_name = "ADDRESS", env = "SESSION_BROKER_ADDRESS", default_value = "127.0.0.1:50051")]
    address: Address,
    /// Encrypt the connection, and believe the system's authorities. The options below encrypt it too.
    #[arg(long)]
    tls: bool,
    /// Believe the authorities in this file instead, PEM.
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Show this client certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The key of the client certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// The name that the broker's certificate must have; the address's host unless said.
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// Take the bearer token from this file; without it, from the variable SESSION_BROKER_TOKEN if that is set.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Send a token in plain text to another machine, where something else encrypts the way.
    #[arg(long)]
    plaintext_beyond_loopback: bool,
    /// The longest that a call may take, such as 10s: 30s unless said, and for a statement what the broker allows it.
    #[arg(long, value_name = "DURATION", value_parser = call_timeout)]
    timeout: Option<Duration>,
    /// Whether to colour what is shown; on a terminal unless said, and not where NO_COLOR is set.
    #[arg(long, value_enum, default_value_t = Color::Auto)]
    color: Color,
}

impl Command {
    /// Does it, and tells on standard error what went wrong: 1 when a call failed, 2 when the arguments make no sense.
    pub fn run(self) -> ExitCode {
        let color = self.common().color;
        match perform(self) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => {
                failure.tell(color.ink(&stderr()));
                failure.exit_code()
            }
        }
    }

    fn common(&self) -> &Common {
        match self {
            Self::Sessions(sessions) => match &sessions.verb {
                Some(SessionsVerb::Terminate(terminate)) => &terminate.common,
                None => &sessions.common,
            },
            Self::Engines(engines) => &engines.common,
            Self::Drain(drain) => &drain.common,
            Self::Exec(exec) => &exec.common,
        }
    }
}

/// Another thread than the one that prints looks after the connection: a pager that does not read on leaves it alive.
#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn perform(command: Command) -> Result<(), Failure> {
    match command {
        Command::Sessions(sessions) => {
            let Sessions { verb, filter, watch, output, common } = *sessions;
            match (verb, watch) {
                (Some(SessionsVerb::Terminate(terminate)), _) => self::terminate(terminate).await,
                (None, None) => list_sessions(&common, &filter, output).await,
                (None, Some(seconds)) => watch_sessions(&common, &filter, output, Duration::from_secs(seconds)).await,
            }
        }
        Command::Engines(engines) => list_engines(engines).await,
        Command::Drain(drain) => self::drain(drain).await,
        Command::Exec(exec) => execute(*exec).await,
    }
}

async fn list_sessions(common: &Common, filter: &Filter, output: Output) -> Result<(), Failure> {
    let client = common.connect().await?;
    let mut out = BufWriter::new(stdout());
    print_sessions(&client, filter, Listing::sessions(output, common.color.ink(&stdout())), &mut out).await?;
    Ok(out.flush()?)
}

/// Never returns but with a failure: it ends with the program.
async fn watch_sessions(common: &Common, filter: &Filter, output: Output, pause: Duration) -> Result<(), Failure> {
    /// Goes to the first line and clears what is below.
    const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

    let client = common.connect().await?;
    let clears = matches!(output, Output::Table) && stdout().is_terminal();
    let mut before = if clears { CLEAR } else { "" };
    loop {
        // Shown at once when all of it has come, so that it does not flicker.
        let mut shown = before.as_bytes().to_owned();
        print_sessions(&client, filter, Listing::sessions(output, common.color.ink(&stdout())), &mut shown).await?;
        stdout().write_all(&shown)?;
        stdout().flush()?;
        before = match (clears, output) {
            (true, _) => CLEAR,
            (false, Output::Table) => "\n",
            (false, Output::Json) => "",
        };
        sleep(pause).await;
    }
}

async fn print_sessions(
    client: &Client,
    filter: &Filter,
    mut listing: Listing,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let (mut request, mut complete) = (filter.request(), true);
    loop {
        let page = client.list_sessions(request.clone()).await?;
        for session in page.sessions {
            listing.item(out, session, session_cells, session_json)?;
        }
        complete &= page.blockers_complete;
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    listing.end(out)?;
    if !complete {
        tell("not every session whose statement runs could be asked whom it waits for");
    }
    Ok(())
}

async fn terminate(terminate: Terminate) -> Result<(), Failure> {
    let Terminate { session_id, reason, output, common } = terminate;
    let client = common.connect().await?;
    let ended = client.terminate_session(session_id.clone(), reason).await?;
    let why = ended.end_reason().as_str_name();
    let pb::TerminateSessionResponse { session, end_reason: _, is_over } = ended;
    let mut out = stdout();
    match output {
        Output::Json => {
            let session = session.map(session_json);
            one_object(&mut out, &json!({ "session": session, "end_reason": why, "is_over": is_over }))?;
        }
        Output::Table => {
            let what = match (session, is_over) {
                (Some(_), true) => "has ended, and its transaction is over",
                (Some(_), false) => "has ended, and its transaction goes on until PostgreSQL answers",
                (None, _) => "had ended already",
            };
            writeln!(out, "{}: {what}: {}", escape(&session_id), why.trim_start_matches("END_REASON_"))?;
        }
    }
    Ok(out.flush()?)
}

async fn list_engines(engines: Engines) -> Result<(), Failure> {
    let Engines { output, common } = engines;
    let engines = common.connect().await?.list_engines().await?;
    let mut out = BufWriter::new(stdout());
    let mut listing = Listing::engines(output, common.color.ink(&stdout()));
    for engine in engines {
        listing.item(&mut out, engine, engine_cells, engine_json)?;
    }
    listing.end(&mut out)?;
    Ok(out.flush()?)
}

async fn drain(drain: Drain) -> Result<(), Failure> {
    let Drain { grace, output, common } = drain;
    let client = common.connect().await?;
    // Before the broker is told to go, so that its going is not missed.
    let mut presence = client.watch().await?;
    let live = client.drain(grace).await?;
    if matches!(output, Output::Json) {
        one_object(&mut stdout(), &json!({ "live_sessions": live }))?;
    }
    let mut progress = Progress::begin();
    progress.say(&draining(live.into()));
    tokio::select! {
        () = presence.gone() => {}
        counted = count_down(&client, &mut progress) => counted?,
    }
    progress.say("the broker is gone");
    Ok(())
}

/// Says how many sessions are live, until nobody answers any more.
async fn count_down(client: &Client, progress: &mut Progress) -> Result<(), Failure> {
    const PAUSE: Duration = Duration::from_millis(500);

    loop {
        sleep(PAUSE).await;
        match live_sessions(client).await {
            Ok(live) => progress.say(&draining(live)),
            // Said by the transport, not by a broker.
            Err(error) if error.reason.is_empty() && error.code == "UNAVAILABLE" => return Ok(()),
            // A broker that is slow to answer is still there.
            Err(error) if error.reason.is_empty() => {}
            Err(error) => return Err(error.into()),
        }
    }
}

async fn live_sessions(client: &Client) -> Result<u64, CallError> {
    let mut request = pb::ListSessionsRequest { page_size: PAGE_SIZE, ..Default::default() };
    let mut live = 0;
    loop {
        let page = client.list_sessions(request.clone()).await?;
        live += count(&page.sessions);
        if page.next_page_token.is_empty() {
            return Ok(live);
        }
        request.page_token = page.next_page_token;
    }
}

fn draining(live: u64) -> String {
    format!("draining: sessions still live: {live}")
}

async fn execute(exec: Exec) -> Result<(), Failure> {
    /// A call suspends it, and nothing comes between two calls.
    const LEASE: Duration = Duration::from_secs(10);

    let format = exec.format()?;
    let Exec { engine, profile, parameters, read_only, max_rows, file, output: _, sql, common } = exec;
    let client = common.connect().await?;
    let options = pb::SessionOptions { read_only, ..Default::default() };
    let begun = client
        .begin_session(pb::BeginSessionRequest {
            engine: engine.unwrap_or_default(),
            profile: profile.unwrap_or_default(),
            lease_ttl: client::to_wire(LEASE),
            options: Some(options),
            ..Default::default()
        })
        .await?;
    // Not before there is a broker to fill it: what is there already is worth more than nothing.
    let mut out = match Counted::open(file.as_deref()) {
        Ok(out) => out,
        Err(failure) => {
            let _ = client.close(begun.session_token).await;
            return Err(failure);
        }
    };
    let request = pb::ExecuteStreamRequest {
        session_token: begun.session_token.clone(),
        sql: sql.clone(),
        parameters: parameters.iter().map(parameter).collect(),
        commit: true,
        max_rows: max_rows.unwrap_or_default(),
        ..Default::default()
    };
    let done = tokio::select! {
        done = stream_rows(&client, request, common.timeout, format, &mut out) => done,
        Ok(()) = ctrl_c() => Err(Failure::Interrupted),
    };
    // Where this fails, the lease ends the session.
    let _ = client.close(begun.session_token).await;
    match (done, file) {
        (Ok(done), None) => {
            if let Format::Table(ink) = format {
                writeln!(out, "{}", ink.paint(Tone::Dim, &escape(&done.command_tag)))?;
            }
            Ok(out.flush()?)
        }
        (Ok(done), Some(path)) => {
            tell(&format!("{}: {} rows, {} bytes in {}", done.command_tag, done.rows, out.bytes, path.display()));
            Ok(())
        }
        (Err(failure), None) => Err(failure.of_statement(sql)),
        (Err(failure), Some(path)) => Err(Failure::Incomplete(failure.of_statement(sql).into(), path)),
    }
}

/// A result that was written to its end.
struct Written {
    rows: u64,
    command_tag: String,
}

async fn stream_rows(
    client: &Client,
    request: pb::ExecuteStreamRequest,
    deadline: Option<Duration>,
    format: Format,
    out: &mut Counted,
) -> Result<Written, Failure> {
    let incomplete = || CallError::local("DATA_LOSS", "the result broke off before it was complete".into());
    let mut parts = client.execute_stream(request, deadline).await?;
    let Some(Part::Header(pb::ResultHeader { columns })) = parts.next().await? else {
        return Err(incomplete().into());
    };
    let mut writer = RowWriter::begin(format, &columns, out)?;
    let mut progress = out.goes_to_file.then(Progress::begin);
    let mut rows = 0;
    let trailer = loop {
        match parts.next().await? {
            Some(Part::Chunk(chunk)) => {
                tell_notices(&chunk.notices);
                for row in &chunk.rows {
                    writer.row(&row.values, out)?;
                }
                rows += count(&chunk.rows);
                // Whoever looks on sees what there is.
                out.flush()?;
                if let Some(progress) = &mut progress {
                    progress.say_now_and_then(|| format!("{rows} rows, {} bytes", out.bytes));
                }
            }
            Some(Part::Trailer(trailer)) => break trailer,
            Some(Part::Header(_)) | None => return Err(incomplete().into()),
        }
    };
    tell_notices(&trailer.notices);
    writer.end(out)?;
    out.flush()?;
    Ok(Written { rows, command_tag: trailer.command_tag })
}

fn parameter(value: &Secret) -> pb::Parameter {
    let kind = pb::value::Kind::StringValue(value.expose().to_owned());
    pb::Parameter { value: Some(pb::Value { kind: Some(kind) }), r#type: String::new() }
}

impl Exec {
    fn format(&self) -> Result<Format, Failure> {
        match (self.output, self.file.is_some()) {
            (None | Some(RowOutput::Table), false) => Ok(Format::Table(self.common.color.ink(&stdout()))),
            (Some(RowOutput::Json), false) => Ok(Format::JsonArray),
            (Some(RowOutput::Json), true) => Ok(Format::JsonLines),
            (Some(RowOutput::Csv), _) | (None, true) => Ok(Format::Csv),
            (Some(RowOutput::Table), true) => {
                Err(Failure::Usage("--output: must be csv or json for a file, not table".into()))
            }
        }
    }
}

impl Filter {
    fn request(&self) -> pb::ListSessionsRequest {
        let Self { principal, engine, profile, state, labels, idle_longer_than, transaction_longer_than } = self;
        let transaction_state = match state {
            None => pb::TransactionState::Unspecified,
            Some(StateFilter::Open) => pb::TransactionState::Open,
            Some(StateFilter::Failed) => pb::TransactionState::Failed,
            Some(StateFilter::Without) => pb::TransactionState::None,
        };
        pb::ListSessionsRequest {
            principal: principal.clone().unwrap_or_default(),
            engine: engine.clone().unwrap_or_default(),
            profile: profile.clone().unwrap_or_default(),
            transaction_state: transaction_state.into(),
            labels: labels.iter().cloned().collect(),
            idle_longer_than: idle_longer_than.and_then(client::to_wire),
            transaction_longer_than: transaction_longer_than.and_then(client::to_wire),
            session_id: String::new(),
            page_size: PAGE_SIZE,
            page_token: String::new(),
        }
    }
}

/// As many sessions as the broker gives at once.
const PAGE_SIZE: u32 = 1000;

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn call_timeout(text: &str) -> Result<Duration, String> {
    const MAX: Duration = Duration::from_hours(24);

    match parse_duration(text) {
        Ok(timeout) if !timeout.is_zero() && timeout <= MAX => Ok(timeout),
        Ok(_) => Err("must be more than nothing, and up to 24h".into()),
        Err(error) => Err(error.to_string()),
    }
}

impl Common {
    async fn connect(&self) -> Result<Client, Failure> {
        Ok(Client::connect(self.target()?).await?)
    }

    fn target(&self) -> Result<Target, Failure> {
        let Self { address, plaintext_beyond_loopback, timeout, .. } = self;
        let (tls, token) = (self.tls()?, self.token()?);
        if tls.is_some() && matches!(address, Address::Unix(_)) {
            return Err(Failure::Usage("--address: a Unix socket is not encrypted: leave TLS's options out".into()));
        }
        if token.is_some() && tls.is_none() && !address.is_local() && !plaintext_beyond_loopback {
            let problem = "the token would be sent to another machine in plain text: give --tls or --tls-ca, or \
                           --plaintext-beyond-loopback where something else encrypts";
            return Err(Failure::Usage(problem.into()));
        }
        Ok(Target { address: address.clone(), tls, token, timeout: timeout.unwrap_or(TIMEOUT) })
    }

    fn tls(&self) -> Result<Option<Tls>, Failure> {
        let Self { tls, tls_ca, tls_cert, tls_key, server_name, .. } = self;
        if !tls && tls_ca.is_none() && tls_cert.is_none() && server_name.is_none() {
            return Ok(None);
        }
        let authorities = tls_ca.as_deref().map(|file| read("--tls-ca", file)).transpose()?;
        let certificate = tls_cert.as_deref().map(|file| read("--tls-cert", file)).transpose()?;
        let key = tls_key.as_deref().map(|file| read("--tls-key", file)).transpose()?.map(Secret::new);
        Ok(Some(Tls { authorities, identity: certificate.zip(key), server_name: server_name.clone() }))
    }

    fn token(&self) -> Result<Option<Secret>, Failure> {
        let given = match &self.token_file {
            Some(file) => read("--token-file", file)?,
            None => match env::var(TOKEN_VARIABLE) {
                Ok(token) => token,
                Err(env::VarError::NotPresent) => return Ok(None),
                Err(env::VarError::NotUnicode(_)) => {
                    return Err(Failure::Usage(format!("{TOKEN_VARIABLE}: is not UTF-8: set it to a token")));
                }
            },
        };
        match (given.trim(), &self.token_file) {
            ("", Some(file)) => {
                Err(Failure::Usage(format!("--token-file: {} is empty: put a token there", file.display())))
            }
            // As good as not set.
            ("", None) => Ok(None),
            (token, _) => Ok(Some(Secret::new(token.to_owned()))),
        }
    }
}

fn read(option: &str, file: &Path) -> Result<String, Failure> {
    fs::read_to_string(file)
        .map_err(|error| Failure::Usage(format!("{option}: cannot read {}: {error}", file.display())))
}

impl Color {
    fn ink(self, stream: &impl IsTerminal) -> Ink {
        let wanted = match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => stream.is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        };
        if wanted { Ink::Coloured } else { Ink::Plain }
    }
}

/// Things that are listed, each a row or an object.
enum Listing {
    Table(Table),
    Json(Objects),
}

impl Listing {
    fn new(output: Output, headings: &[(&str, Align)], ink: Ink) -> Self {
        match output {
            Output::Table => {
                Self::Table(Table::new(headings.iter().map(|(title, align)| ((*title).to_owned(), *align)), ink))
            }
            Output::Json => Self::Json(Objects::default()),
        }
    }

    fn sessions(output: Output, ink: Ink) -> Self {
        let headings = [
            ("SESSION", Align::Left),
            ("PRINCIPAL", Align::Left),
            ("ENGINE", Align::Left),
            ("PROFILE", Align::Left),
            ("TRANSACTION", Align::Left),
            ("OPEN FOR", Align::Right),
            ("RUNS FOR", Align::Right),
            ("IDLE FOR", Align::Right),
            ("AGE", Align::Right),
            ("BACKEND", Align::Right),
            ("BLOCKED BY", Align::Left),
            ("LABELS", Align::Left),
        ];
        Self::new(output, &headings, ink)
    }

    fn engines(output: Output, ink: Ink) -> Self {
        let headings = [
            ("ENGINE", Align::Left),
            ("DEFAULT", Align::Left),
            ("DATABASE", Align::Left),
            ("USER", Align::Left),
            ("SERVER", Align::Left),
            ("IN USE", Align::Right),
            ("OPEN", Align::Right),
            ("MAX", Align::Right),
            ("WAITING", Align::Right),
            ("PROFILES", Align::Left),
            ("REACHABLE", Align::Left),
        ];
        Self::new(output, &headings, ink)
    }

    fn item<T>(
        &mut self,
        out: &mut dyn Write,
        item: T,
        cells: fn(&T) -> Vec<Cell>,
        object: fn(T) -> Json,
    ) -> io::Result<()> {
        match self {
            Self::Table(table) => table.row(out, cells(&item)),
            Self::Json(objects) => objects.object(out, &object(item)),
        }
    }

    fn end(self, out: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Table(mut table) => table.end(out),
            Self::Json(objects) => objects.end(out),
        }
    }
}

fn one_object(out: &mut dyn Write, object: &Json) -> io::Result<()> {
    let mut objects = Objects::default();
    objects.object(out, object)?;
    objects.end(out)
}

fn session_cells(session: &pb::SessionOverview) -> Vec<Cell> {
    let transaction = match session.state.as_ref().map(pb::SessionState::transaction_state) {
        None | Some(pb::TransactionState::Unspecified) => "",
        Some(pb::TransactionState::None) => "none",
        Some(pb::TransactionState::Open) => "open",
        Some(pb::TransactionState::Failed) => "failed",
    };
    let duration = |duration: Option<Duration>| duration.map(short).unwrap_or_default();
    let pid = if session.backend_pid == 0 { String::new() } else { session.backend_pid.to_string() };
    let blocked_by: Vec<_> = session.blocked_by.iter().map(blocker_text).collect();
    let labels: Vec<_> = session.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    [
        session.session_id.clone(),
        session.principal.clone(),
        session.engine.clone(),
        session.profile.clone(),
        transaction.to_owned(),
        duration(client::from_wire(session.transaction_age)),
        duration(client::from_wire(session.statement_age)),
        duration(client::from_wire(session.idle_time)),
        duration(client::from_wire(session.age)),
        pid,
        blocked_by.join(", "),
        labels.join(" "),
    ]
    .iter()
    .map(|text| Cell::text(text))
    .collect()
}

/// The session in the way or, where it is none, the backend.
fn blocker_text(blocking: &pb::BlockingBackend) -> String {
    match (&blocking.blocker, blocking.session_id.as_str()) {
        (_, id) if !id.is_empty() => id.to_owned(),
        (Some(blocker), _) => {
            let pb::Blocker { backend_pid, user, application_name, state } = blocker;
            format!("pid {backend_pid} ({user}, {application_name}, {state})")
        }
        (None, _) => String::new(),
    }
}

fn session_json(session: pb::SessionOverview) -> Json {
    let pb::SessionOverview {
        session_id,
        principal,
        engine,
        profile,
        labels,
        state,
        age,
        idle_time,
        transaction_age,
        statement_age,
        backend_pid,
        host,
        blocked_by,
        one_shot,
    } = session;
    json!({
        "session_id": session_id,
        "principal": principal,
        "engine": engine,
        "profile": profile,
        "labels": labels_json(labels),
        "state": state.as_ref().map(state_json),
        "age": seconds(client::from_wire(age)),
        "idle_time": seconds(client::from_wire(idle_time)),
        "transaction_age": seconds(client::from_wire(transaction_age)),
        "statement_age": seconds(client::from_wire(statement_age)),
        "backend_pid": backend_pid,
        "host": host,
        "blocked_by": blocked_by.into_iter().map(blocking_json).collect::<Vec<_>>(),
        "one_shot": one_shot,
    })
}

fn state_json(state: &pb::SessionState) -> Json {
    let name = state.transaction_state().as_str_name();
    let pb::SessionState {
        transaction_state: _,
        lease_remaining,
        session_remaining,
        transaction_remaining,
        renew_after,
        draining,
        transaction_id,
        // The caller's, and left out by the broker.
        commit_token: _,
        idle_remaining,
        attached,
    } = *state;
    json!({
        "transaction_state": name,
        "lease_remaining": seconds(client::from_wire(lease_remaining)),
        "session_remaining": seconds(client::from_wire(session_remaining)),
        "transaction_remaining": seconds(client::from_wire(transaction_remaining)),
        "renew_after": seconds(client::from_wire(renew_after)),
        "draining": draining,
        "transaction_id": transaction_id.to_string(),
        "idle_remaining": seconds(client::from_wire(idle_remaining)),
        "attached": attached,
    })
}

fn blocking_json(blocking: pb::BlockingBackend) -> Json {
    let pb::BlockingBackend { blocker, session_id } = blocking;
    let blocker = blocker.map(|blocker| {
        let pb::Blocker { backend_pid, user, application_name, state } = blocker;
        json!({ "backend_pid": backend_pid, "user": user, "application_name": application_name, "state": state })
    });
    json!({ "blocker": blocker, "session_id": session_id })
}

fn labels_json(labels: BTreeMap<String, String>) -> Json {
    Json::Object(labels.into_iter().map(|(key, value)| (key, Json::String(value))).collect())
}

fn engine_cells(engine: &pb::EngineOverview) -> Vec<Cell> {
    let pool = engine.pool.unwrap_or_default();
    let reachable = if engine.reachable { "yes".to_owned() } else { format!("no: {}", engine.unreachable_cause) };
    [
        engine.name.clone(),
        if engine.is_default { "yes".to_owned() } else { String::new() },
        engine.database.clone(),
        engine.user.clone(),
        engine.server_version.clone(),
        pool.in_use.to_string(),
        pool.open.to_string(),
        pool.size.saturating_add(pool.overflow_max).to_string(),
        pool.waiting.to_string(),
        engine.profiles.join(" "),
        reachable,
    ]
    .iter()
    .map(|text| Cell::text(text))
    .collect()
}

fn engine_json(engine: pb::EngineOverview) -> Json {
    let pb::EngineOverview {
        name,
        database,
        user,
        server_version,
        pool,
        reachable,
        unreachable_cause,
        is_default,
        profiles,
    } = engine;
    json!({
        "name": name,
        "database": database,
        "user": user,
        "server_version": server_version,
        "pool": pool.map(pool_json),
        "reachable": reachable,
        "unreachable_cause": unreachable_cause,
        "is_default": is_default,
        "profiles": profiles,
    })
}

fn pool_json(pool: pb::PoolStatistics) -> Json {
    let pb::PoolStatistics { size, overflow_max, open, in_use, idle, waiting, sub_pools, opened, login_failures } =
        pool;
    json!({
        "size": size,
        "overflow_max": overflow_max,
        "open": open,
        "in_use": in_use,
        "idle": idle,
        "waiting": waiting,
        "sub_pools": sub_pools,
        "opened": opened,
        "login_failures": login_failures,
    })
}

fn seconds(duration: Option<Duration>) -> Option<f64> {
    duration.map(|duration| duration.as_secs_f64())
}

fn count<T>(items: &[T]) -> u64 {
    u64::try_from(items.len()).unwrap_or(u64::MAX)
}

/// Where rows go, with the bytes that went there.
struct Counted {
    out: BufWriter<Box<dyn Write>>,
    goes_to_file: bool,
    bytes: u64,
}

impl Counted {
    fn open(file: Option<&Path>) -> Result<Self, Failure> {
        let out: Box<dyn Write> = match file {
            None => Box::new(stdout()),
            Some(path) => Box::new(
                File::create(path)
                    .map_err(|error| Failure::Usage(format!("--file: cannot write {}: {error}", path.display())))?,
            ),
        };
        Ok(Self { out: BufWriter::new(out), goes_to_file: file.is_some(), bytes: 0 })
    }
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.bytes += u64::try_from(written).unwrap_or(u64::MAX);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// How far something is, on standard error: in one line of a terminal, or a line for each change.
struct Progress {
    on_terminal: bool,
    said: String,
    /// When to say more of what changes all the time.
    due: Instant,
}

impl Progress {
    /// As often as eyes can follow.
    const INTERVAL: Duration = Duration::from_millis(100);

    fn begin() -> Self {
        Self { on_terminal: stderr().is_terminal(), said: String::new(), due: Instant::now() }
    }

    fn say(&mut self, text: &str) {
        if self.said == text {
            return;
        }
        text.clone_into(&mut self.said);
        if self.on_terminal {
            // Goes back to the line's beginning and clears it.
            let _ = write!(stderr(), "\r\u{1b}[K{text}");
        } else {
            tell(text);
        }
    }

    /// On a terminal, once in a while: elsewhere the end is enough.
    fn say_now_and_then(&mut self, text: impl FnOnce() -> String) {
        let now = Instant::now();
        if self.on_terminal && now >= self.due {
            self.due = now + Self::INTERVAL;
            self.say(&text());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.on_terminal && !self.said.is_empty() {
            let _ = writeln!(stderr());
        }
    }
}

/// A line on standard error. Nothing is left to tell whom, should that be closed.
fn tell(text: &str) {
    let _ = writeln!(stderr(), "{}", escape(text));
}

fn tell_notices(notices: &[pb::PgError]) {
    for notice in notices {
        tell(&format!("{}: {}", notice.severity, notice.message));
        for line in explanation(notice, None) {
            tell(&line);
        }
    }
}

/// What PostgreSQL says beside the message, line by line; the place in the statement first.
fn explanation(error: &pb::PgError, sql: Option<&str>) -> Vec<String> {
    let place = sql.and_then(|sql| pointed(sql, error.position)).into_iter().flatten();
    // Where a notice comes from is of little use, and said of every one.
    let is_error = matches!(error.severity.as_str(), "ERROR" | "FATAL" | "PANIC");
    let context = if is_error { error.r#where.as_str() } else { "" };
    let more = [("detail", error.detail.as_str()), ("hint", error.hint.as_str()), ("context", context)];
    let more = more.into_iter().filter(|(_, text)| !text.is_empty());
    place.chain(more.map(|(name, text)| format!("{name}: {text}"))).collect()
}

/// Why a verb did not succeed.
#[derive(Debug)]
enum Failure {
    /// The arguments make no sense; nothing was called.
    Usage(String),
    /// A call failed.
    Call(CallError),
    /// A statement failed: why, and which.
    Statement(CallError, String),
    /// The same, and its rows were going into this file.
    Incomplete(Box<Failure>, PathBuf),
    /// What came could not be written.
    Output(io::Error),
    /// Ctrl-C.
    Interrupted,
}

impl Failure {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Call(_) | Self::Statement(..) | Self::Incomplete(..) | Self::Output(_) | Self::Interrupted => {
                ExitCode::FAILURE
            }
        }
    }

    fn of_statement(self, sql: String) -> Self {
        match self {
            Self::Call(error) => Self::Statement(error, sql),
            Self::Usage(_) | Self::Statement(..) | Self::Incomplete(..) | Self::Output(_) | Self::Interrupted => self,
        }
    }

    /// Says on standard error what failed, in one line, and below it what more is known.
    fn tell(&self, ink: Ink) {
        let _ = writeln!(stderr(), "{} {}", ink.paint(Tone::Red, "session-broker:"), escape(&self.to_string()));
        for line in self.more() {
            tell(&line);
        }
    }

    fn more(&self) -> Vec<String> {
        let explained = |error: &CallError, sql| error.pg_error.as_ref().map(|error| explanation(error, sql));
        match self {
            Self::Call(error) => explained(error, None).unwrap_or_default(),
            Self::Statement(error, sql) => explained(error, Some(sql.as_str())).unwrap_or_default(),
            Self::Incomplete(failure, path) => {
                let mut more = failure.more();
                more.push(format!("{} is incomplete", path.display()));
                more
            }
            Self::Usage(_) | Self::Output(_) | Self::Interrupted => Vec::new(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(problem) => f.write_str(problem),
            Self::Call(error) | Self::Statement(error, _) => write!(f, "{error}"),
            Self::Incomplete(failure, _) => write!(f, "{failure}"),
            Self::Output(error) => write!(f, "cannot write: {error}"),
            Self::Interrupted => f.write_str("interrupted: the statement was stopped, unless it had committed before"),
        }
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}
