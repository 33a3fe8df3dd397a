//! Who is sent what over OTLP, as the standard `OTEL_*` variables say: gRPC or HTTP, TLS, headers, compression.
//!
//! Nothing is sent unless a variable names where to, or asks for it. Invariant: a variable that is wrong is refused at the
//! start, by its name; what it holds is not shown where it may be a secret.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response, ResponseBodyTooLarge};
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};
use opentelemetry_otlp::{
    ExporterBuildError, LogExporter, MetricExporter, SpanExporter, WithHttpConfig, WithTonicConfig,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use ureq::Agent;
use ureq::tls::{ClientCert, PrivateKey};

use super::delivery::Signal;
use crate::{https, pem};

/// How long a collector may take, unless a variable says otherwise.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The longest answer of a collector that is read.
const ANSWER_BYTES_MAX: u64 = 1024 * 1024;

/// Why nothing can be sent: a variable of the environment is wrong.
#[derive(Debug, thiserror::Error)]
#[error("{variable}: {problem}")]
pub struct OtlpError {
    variable: String,
    problem: String,
}

/// What sends what; `None`: it is not sent.
#[derive(Debug, Default)]
pub(super) struct Exporters {
    pub(super) spans: Option<SpanExporter>,
    pub(super) metrics: Option<MetricExporter>,
    pub(super) logs: Option<LogExporter>,
}

impl Exporters {
    /// Call it on a tokio runtime.
    pub(super) fn from_environment() -> Result<Self, OtlpError> {
        if stated("OTEL_SDK_DISABLED")?.is_some_and(|disabled| disabled.eq_ignore_ascii_case("true")) {
            return Ok(Self::default());
        }
        check_sampler()?;
        let spans = Route::of(Signal::Traces)?.map(|route| {
            route.built(match route.protocol {
                Protocol::Grpc => SpanExporter::builder().with_tonic().with_tls_config(route.grpc_tls()?).build(),
                Protocol::Http => SpanExporter::builder().with_http().with_http_client(route.http()?).build(),
            })
        });
        let metrics = Route::of(Signal::Metrics)?.map(|route| {
            route.built(match route.protocol {
                Protocol::Grpc => MetricExporter::builder().with_tonic().with_tls_config(route.grpc_tls()?).build(),
                Protocol::Http => MetricExporter::builder().with_http().with_http_client(route.http()?).build(),
            })
        });
        let logs = Route::of(Signal::Logs)?.map(|route| {
            route.built(match route.protocol {
                Protocol::Grpc => LogExporter::builder().with_tonic().with_tls_config(route.grpc_tls()?).build(),
                Protocol::Http => LogExporter::builder().with_http().with_http_client(route.http()?).build(),
            })
        });
        Ok(Self { spans: spans.transpose()?, metrics: metrics.transpose()?, logs: logs.transpose()? })
    }
}

#[derive(Debug, Clone, Copy)]
enum Protocol {
    Grpc,
    Http,
}

/// Says what is wrong with the sampler asked for: the SDK would keep all traces instead.
fn check_sampler() -> Result<(), OtlpError> {
    const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
    const ARGUMENT: &str = "OTEL_TRACES_SAMPLER_ARG";
    const SAMPLERS: [&str; 6] = [
        "always_on",
        "always_off",
        "traceidratio",
        "parentbased_always_on",
        "parentbased_always_off",
        "parentbased_traceidratio",
    ];
    if let Some(sampler) = stated(SAMPLER)?
        && !SAMPLERS.contains(&sampler.as_str())
    {
        let problem = format!("{sampler:?} is not there: use one of {}", SAMPLERS.join(", "));
        return Err(OtlpError { variable: SAMPLER.to_owned(), problem });
    }
    match stated(ARGUMENT)? {
        Some(ratio) if !ratio.parse().is_ok_and(|ratio: f64| (0.0..=1.0).contains(&ratio)) => {
            Err(OtlpError { variable: ARGUMENT.to_owned(), problem: format!("{ratio:?} is no number from 0 to 1") })
        }
        _ => Ok(()),
    }
}

/// How a signal is sent.
#[derive(Debug)]
struct Route {
    signal: Signal,
    protocol: Protocol,
    timeout: Duration,
}

impl Route {
    /// `None` for one that is not sent.
    fn of(signal: Signal) -> Result<Option<Self>, OtlpError> {
        let wanted = format!("OTEL_{}_EXPORTER", signal.variable());
        let is_sent = match stated(&wanted)?.as_deref() {
            None => signal.stated("ENDPOINT")?.is_some(),
            Some(exporters) => {
                let mut is_sent = false;
                for exporter in exporters.split(',').map(str::trim) {
                    match exporter {
                        "otlp" => is_sent = true,
                        // Metrics can be scraped whatever is said here.
                        "none" | "prometheus" => {}
                        other => {
                            let problem = format!("{other:?} is not there: use otlp or none");
                            return Err(OtlpError { variable: wanted, problem });
                        }
                    }
                }
                is_sent
            }
        };
        if !is_sent {
            return Ok(None);
        }
        let protocol = match signal.stated("PROTOCOL")? {
            None => Protocol::Grpc,
            Some((variable, protocol)) => match protocol.as_str() {
                "grpc" => Protocol::Grpc,
                "http/protobuf" => Protocol::Http,
                other => {
                    let problem = format!("{other:?} is not there: use grpc or http/protobuf");
                    return Err(OtlpError { variable, problem });
                }
            },
        };
        let timeout = match signal.stated("TIMEOUT")? {
            None => TIMEOUT,
            Some((variable, text)) => match text.parse() {
                Ok(milliseconds) => Duration::from_millis(milliseconds),
                Err(_) => {
                    let problem = format!("{text:?} is no number of milliseconds");
                    return Err(OtlpError { variable, problem });
                }
            },
        };
        Ok(Some(Self { signal, protocol, timeout }))
    }

    fn built<T>(&self, built: Result<T, ExporterBuildError>) -> Result<T, OtlpError> {
        built.map_err(|error| OtlpError {
            variable: format!("OTEL_EXPORTER_OTLP_* for {}", self.signal.name()),
            problem: error.to_string(),
        })
    }

    /// What a variable that names a file of PEM says is in it.
    fn file<T>(&self, name: &str, read: impl FnOnce(&Path) -> Result<T, String>) -> Result<Option<T>, OtlpError> {
        let Some((variable, path)) = self.signal.stated(name)? else { return Ok(None) };
        match read(&PathBuf::from(path)) {
            Ok(read) => Ok(Some(read)),
            Err(problem) => Err(OtlpError { variable, problem }),
        }
    }

    /// The client's certificate and its key, if it has them.
    fn identity<C, K>(
        &self,
        certificate: impl FnOnce(&Path) -> Result<C, String>,
        key: impl FnOnce(&Path) -> Result<K, String>,
    ) -> Result<Option<(C, K)>, OtlpError> {
        match (self.file("CLIENT_CERTIFICATE", certificate)?, self.file("CLIENT_KEY", key)?) {
            (None, None) => Ok(None),
            (Some(certificate), Some(key)) => Ok(Some((certificate, key))),
            (certificate, _) => {
                let missing = if certificate.is_some() { "CLIENT_KEY" } else { "CLIENT_CERTIFICATE" };
                let problem = "is missing: certificate and key go together".to_owned();
                Err(OtlpError { variable: format!("OTEL_EXPORTER_OTLP_{missing}"), problem })
            }
        }
    }

    fn grpc_tls(&self) -> Result<ClientTlsConfig, OtlpError> {
        let text = |path: &Path| {
            // That it is what it should be is said better here than by whoever parses it later.
            pem::all::<CertificateDer<'static>>(path, "certificate")?;
            std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let key = |path: &Path| {
            pem::one::<PrivateKeyDer<'static>>(path, "private key")?;
            std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let mut tls = match self.file("CERTIFICATE", text)? {
            None => ClientTlsConfig::new().with_enabled_roots(),
            Some(roots) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots)),
        };
        if let Some((certificate, key)) = self.identity(text, key)? {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        Ok(tls)
    }

    fn http(&self) -> Result<Http, OtlpError> {
        let key = |path: &Path| {
            pem::one::<PrivateKeyDer<'static>>(path, "private key")?;
            let pem = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
            PrivateKey::from_pem(&pem).map_err(|_| format!("{}: holds no private key", path.display()))
        };
        let roots = self.file("CERTIFICATE", https::certificates)?.unwrap_or_else(https::system_roots);
        let client = self.identity(https::certificates, key)?;
        let client = client.map(|(chain, key)| ClientCert::new_with_certs(&chain, key));
        Ok(Http(https::agent(&roots, client, self.timeout)))
    }
}

impl Signal {
    /// What a variable says for this signal, or for all; with its name.
    fn stated(self, name: &str) -> Result<Option<(String, String)>, OtlpError> {
        for variable in [format!("OTEL_EXPORTER_OTLP_{}_{name}", self.variable()), format!("OTEL_EXPORTER_OTLP_{name}")]
        {
            if let Some(value) = stated(&variable)? {
                return Ok(Some((variable, value)));
            }
        }
        Ok(None)
    }

    fn variable(self) -> String {
        self.name().to_ascii_uppercase()
    }
}

/// What a variable says. One that is empty says nothing.
fn stated(variable: &str) -> Result<Option<String>, OtlpError> {
    match std::env::var(variable) {
        Ok(value) if !value.is_empty() => Ok(Some(value)),
        Ok(_) | Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => {
            Err(OtlpError { variable: variable.to_owned(), problem: "is not UTF-8".into() })
        }
    }
}

/// Sends over HTTP, on the thread that asks: the exporters have their own.
#[derive(Debug)]
struct Http(Agent);

#[async_trait]
impl HttpClient for Http {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let response = self.0.run(Request::from_parts(parts, &body[..]))?;
        let (parts, body) = response.into_parts();
        let mut answer = Vec::new();
        let read = body.into_reader().take(ANSWER_BYTES_MAX + 1).read_to_end(&mut answer)?;
        if read as u64 > ANSWER_BYTES_MAX {
            return Err(Box::new(ResponseBodyTooLarge::new()));
        }
        Ok(Response::from_parts(parts, answer.into()))
    }
}
