//! The request's target and host: what DNS rebinding and request smuggling play with.

use axum::http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use axum::http::{HeaderMap, StatusCode, Uri, Version};

use crate::error::ApiError;

/// Refuses what no honest client sends: HTTP/1.0, no or several `Host`s, one that is no host, one that is not served, a
/// target with a host of its own, both kinds of body length.
pub(crate) fn check(
    version: Version,
    uri: &Uri,
    headers: &HeaderMap,
    allowed: &[String],
) -> Result<(), ApiError> {
    let refuse = |message| Err(ApiError::request_line(StatusCode::BAD_REQUEST, message));
    if version != Version::HTTP_11 {
        let status = StatusCode::HTTP_VERSION_NOT_SUPPORTED;
        return Err(ApiError::request_line(status, "only HTTP/1.1 is spoken here"));
    }
    if uri.scheme().is_some() || uri.authority().is_some() {
        return refuse("the request's target must be a path");
    }
    if headers.contains_key(CONTENT_LENGTH) && headers.contains_key(TRANSFER_ENCODING) {
        return refuse("Content-Length and Transfer-Encoding exclude each other");
    }
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return refuse("exactly one Host header is needed");
    };
    let Some(name) = host.to_str().ok().and_then(host_name) else {
        return refuse("the Host header is not a host name or address");
    };
    if !allowed.is_empty() && !allowed.iter().any(|a| a.eq_ignore_ascii_case(name)) {
        return refuse("the Host header names a host that is not served here; see --allowed-hosts");
    }
    Ok(())
}

/// The host of `host[:port]`, without brackets and port; none when it is not of that form.
pub(crate) fn host_name(value: &str) -> Option<&str> {
    let (name, rest, charset): (&str, &str, fn(u8) -> bool) = match value.strip_prefix('[') {
        Some(inner) => {
            let (name, rest) = inner.split_once(']')?;
            (name, rest, |b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.'))
        }
        None => {
            let end = value.find(':').unwrap_or(value.len());
            let (name, rest) = value.split_at_checked(end)?;
            (name, rest, |b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
        }
    };
    let port = match rest.strip_prefix(':') {
        Some(port) => (1..=5).contains(&port.len()) && port.bytes().all(|b| b.is_ascii_digit()),
        None => rest.is_empty(),
    };
    let fits = (1..=253).contains(&name.len()) && name.bytes().all(charset);
    (fits && port).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn hosts_are_names_or_addresses_with_an_optional_port() {
        for (value, name) in [
            ("localhost", "localhost"),
            ("localhost:8000", "localhost"),
            ("10.0.0.7:80", "10.0.0.7"),
            ("[::1]:8000", "::1"),
            ("[::1]", "::1"),
            ("my_service.default.svc", "my_service.default.svc"),
        ] {
            assert_eq!(host_name(value), Some(name));
        }
        for bad in [
            "",
            ":80",
            "localhost:",
            "localhost:x",
            "localhost:123456",
            "localhost/v1/models?",
            "x#",
            "user@host",
            "::1",
            "[::1",
            "[]",
            "[::1]x",
            "a b",
            "höst",
        ] {
            assert_eq!(host_name(bad), None, "{bad}");
        }
    }

    fn request(uri: &str, hosts: &[&str], allowed: &[&str]) -> Result<(), StatusCode> {
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append(HOST, HeaderValue::from_str(host).unwrap());
        }
        let allowed: Vec<String> = allowed.iter().map(|a| (*a).into()).collect();
        check(Version::HTTP_11, &uri.parse().unwrap(), &headers, &allowed).map_err(|e| e.status)
    }

    #[test]
    fn what_no_honest_client_sends_is_refused() {
        assert_eq!(request("/v1/models", &["any.host"], &[]), Ok(()));
        assert_eq!(request("/v1/models", &["LocalHost:1"], &["localhost"]), Ok(()));
        assert_eq!(request("/v1/models", &["evil.example"], &["localhost"]), Err(StatusCode::BAD_REQUEST));
        assert_eq!(request("/v1/models", &[], &[]), Err(StatusCode::BAD_REQUEST));
        assert_eq!(request("/v1/models", &["a", "a"], &[]), Err(StatusCode::BAD_REQUEST));
        assert_eq!(request("http://other/v1/models", &["a"], &[]), Err(StatusCode::BAD_REQUEST));
        let headers = HeaderMap::from_iter([(HOST, HeaderValue::from_static("a"))]);
        let old = check(Version::HTTP_10, &"/".parse().unwrap(), &headers, &[]);
        assert_eq!(old.unwrap_err().status, StatusCode::HTTP_VERSION_NOT_SUPPORTED);
    }
}
