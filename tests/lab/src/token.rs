//! Tokens of a ServiceAccount that expire soon: an API server makes none for less than ten minutes, but takes what its key signed.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::KeyPair;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};

/// What API servers allow for clocks that differ (go-jose, `DefaultLeeway`).
const LEEWAY: Duration = Duration::from_secs(60);

/// The same token (RFC 7519), taken by an API server for `lasts` from now on, signed with `key`, in PEM (RFC 7518, ES256).
///
/// # Errors
/// It is no such token, or that is no such key.
pub(crate) fn shortened(token: &str, key: &str, lasts: Duration) -> Result<String> {
    let mut parts = token.split('.');
    let (Some(head), Some(claims)) = (parts.next(), parts.next()) else {
        return Err(anyhow!("the token has no claims"));
    };
    let claims = URL_SAFE_NO_PAD
        .decode(claims)
        .context("decoding the token's claims")?;
    let mut claims: Value = serde_json::from_slice(&claims).context("reading the token's claims")?;
    let end = SystemTime::now() + lasts - LEEWAY;
    claims["exp"] = json!(end.duration_since(SystemTime::UNIX_EPOCH)?.as_secs());
    let signed = format!("{head}.{}", URL_SAFE_NO_PAD.encode(serde_json::to_vec(&claims)?));
    let random = SystemRandom::new();
    let key = KeyPair::from_pem(key).context("reading the key")?.serialize_der();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key, &random)
        .map_err(|error| anyhow!("using the key: {error}"))?;
    let signature = key
        .sign(&random, signed.as_bytes())
        .map_err(|error| anyhow!("signing the token: {error}"))?;
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}
