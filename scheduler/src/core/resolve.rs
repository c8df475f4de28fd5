//! Which model a prompt line means, whether it fits that model, and the key that makes submitting idempotent.

use std::collections::{BTreeMap, HashMap};

use farm_core::api::ModelView;
use farm_core::id::{SubmissionId, TenantId};
use farm_core::job::spec::{GenerationDefaults, RenderRequest, RenderSpec};
use sha2::{Digest, Sha256};

/// The registered models: name → content hash and generation defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Models(pub BTreeMap<String, (String, GenerationDefaults)>);

impl Models {
    pub fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    pub fn views(&self) -> Vec<ModelView> {
        self.0.iter().map(|(name, (hash, _))| ModelView { name: name.clone(), hash: hash.clone() }).collect()
    }

    /// The model of a job that may name one. `Ok(None)`: not known before a node registers; `Err`: several are
    /// registered and none is named.
    pub fn choose(&self, named: Option<&str>) -> Result<Option<String>, String> {
        match (named, self.0.len()) {
            (Some(name), _) => Ok(Some(name.to_owned())),
            (None, 0) => Ok(None),
            (None, 1) => Ok(self.0.keys().next().cloned()),
            (None, _) => {
                Err(format!("several models are registered ({}); name one with --model", self.names().join(", ")))
            }
        }
    }

    /// Whether the request fits the model's defaults, as far as the model is known.
    pub fn check(&self, request: &RenderRequest, model: Option<&str>) -> Result<(), String> {
        let Some((_, defaults)) = model.and_then(|name| self.0.get(name)) else { return Ok(()) };
        RenderSpec::resolve(request, defaults, 0).map(drop).map_err(|error| error.to_string())
    }
}

/// Makes the keys of one file's lines.
pub struct Keys<'a> {
    salt: Option<SubmissionId>,
    tenant: Option<&'a TenantId>,
    seen: HashMap<[u8; 32], u64>,
}

impl<'a> Keys<'a> {
    /// `again` makes keys that no other submission has, so that every line is a new job. Two tenants never share a job: one
    /// of them would be charged for both, and could cancel it.
    pub fn new(again: Option<SubmissionId>, tenant: &'a TenantId) -> Self {
        // The default tenant's keys are those of versions that knew no tenants.
        let tenant = Some(tenant).filter(|tenant| tenant.as_str() != TenantId::DEFAULT);
        Self { salt: again, tenant, seen: HashMap::new() }
    }

    /// sha-256 over what is rendered, the model asked for, and how many equal lines came before. Priority is left
    /// out: the same line with another priority is the same clip.
    pub fn key(&mut self, request: &RenderRequest, named_model: Option<&str>) -> Result<[u8; 32], serde_json::Error> {
        let content = RenderRequest { priority: None, model: None, ..request.clone() };
        let content: [u8; 32] =
            Sha256::new().chain_update(serde_json::to_vec(&(&content, named_model))?).finalize().into();
        let occurrence = self.seen.entry(content).or_insert(0);
        let mut key = Sha256::new().chain_update(content).chain_update(occurrence.to_le_bytes());
        *occurrence += 1;
        if let Some(tenant) = self.tenant {
            key.update(tenant.as_str());
        }
        if let Some(salt) = self.salt {
            key.update(salt.0.as_bytes());
        }
        Ok(key.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use farm_core::job::spec::GuidanceScale;
    use uuid::Uuid;

    use super::*;

    fn request(json: &str) -> RenderRequest {
        serde_json::from_str(json).unwrap()
    }

    fn models(names: &[&str]) -> Models {
        let entry = |name: &&str| (name.to_string(), ("hash".to_owned(), GenerationDefaults::default()));
        Models(names.iter().map(entry).collect())
    }

    #[test]
    fn equal_lines_differ_by_occurrence_and_priority_does_not_count() {
        let tenant = TenantId::default();
        let mut keys = Keys::new(None, &tenant);
        let first = keys.key(&request(r#"{"prompt":"a"}"#), None).unwrap();
        let second = keys.key(&request(r#"{"prompt":"a","priority":7}"#), None).unwrap();
        assert_ne!(first, second);
        let mut later = Keys::new(None, &tenant);
        assert_eq!(later.key(&request(r#"{"prompt":"a","priority":3}"#), None).unwrap(), first);
        assert_eq!(later.key(&request(r#"{"prompt":"a"}"#), None).unwrap(), second);
    }

    #[test]
    fn a_model_on_the_line_and_one_for_the_file_give_the_same_key() {
        let line =
            Keys::new(None, &TenantId::default()).key(&request(r#"{"prompt":"a","model":"m"}"#), Some("m")).unwrap();
        let file = Keys::new(None, &TenantId::default()).key(&request(r#"{"prompt":"a"}"#), Some("m")).unwrap();
        assert_eq!(line, file);
        assert_ne!(line, Keys::new(None, &TenantId::default()).key(&request(r#"{"prompt":"a"}"#), None).unwrap());
    }

    #[test]
    fn tenants_do_not_share_jobs() {
        let a = request(r#"{"prompt":"a"}"#);
        let key = |tenant: &str| Keys::new(None, &tenant.parse().unwrap()).key(&a, None).unwrap();
        assert_eq!(key("x"), key("x"));
        assert_ne!(key("x"), key("y"));
        assert_ne!(key("x"), key(TenantId::DEFAULT));
    }

    #[test]
    fn again_gives_keys_of_its_own() {
        let a = request(r#"{"prompt":"a"}"#);
        let salted = |n| Keys::new(Some(SubmissionId(Uuid::from_u128(n))), &TenantId::default()).key(&a, None).unwrap();
        assert_ne!(salted(1), Keys::new(None, &TenantId::default()).key(&a, None).unwrap());
        assert_ne!(salted(1), salted(2));
    }

    #[test]
    fn a_line_without_model_means_the_only_one() {
        assert_eq!(models(&[]).choose(None), Ok(None));
        assert_eq!(models(&["m"]).choose(None), Ok(Some("m".to_owned())));
        assert!(models(&["m", "n"]).choose(None).unwrap_err().contains("m, n"));
        assert_eq!(models(&["m", "n"]).choose(Some("x")), Ok(Some("x".to_owned())));
    }

    #[test]
    fn a_request_is_checked_against_the_defaults_of_a_known_model_only() {
        let mut wrong = request(r#"{"prompt":"a"}"#);
        wrong.guidance_scale = Some(GuidanceScale::PerStep(vec![1.0; 3])); // the defaults have 64 steps
        assert!(models(&["m"]).check(&wrong, Some("m")).unwrap_err().contains("3 values for 64 steps"));
        assert_eq!(models(&["m"]).check(&wrong, Some("other")), Ok(()));
    }
}
