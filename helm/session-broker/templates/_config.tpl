{{/* Where everything is mounted: the configuration and the files that it names, in one volume that changes as one. */}}
{{- define "session-broker.directory" -}}/etc/session-broker{{- end -}}

{{/* broker.toml: config, with the places of the mounted files and the addresses of the ports put in. */}}
{{- define "session-broker.toml" -}}
{{- $config := deepCopy .Values.config -}}
{{- $directory := include "session-broker.directory" . -}}
{{- include "session-broker.checkConfig" . -}}
{{- if not (hasKey $config "listen") -}}
{{- $_ := set $config "listen" (printf "%s:%d" (include "session-broker.anyHost" .) (int64 .Values.ports.grpc)) -}}
{{- end -}}
{{- $operations := $config.operations | default dict -}}
{{- if not (hasKey $operations "listen") -}}
{{- $_ := set $operations "listen" (printf "%s:%d" (include "session-broker.anyHost" .) (int64 .Values.ports.operations)) -}}
{{- end -}}
{{- $_ := set $config "operations" $operations -}}

{{- $tls := $config.tls | default dict -}}
{{- if .Values.tls.existingSecret -}}
{{- $_ := set $tls "certificate" (printf "%s/tls/tls.crt" $directory) -}}
{{- $_ := set $tls "key" (printf "%s/tls/tls.key" $directory) -}}
{{- end -}}
{{- if include "session-broker.isGiven" .Values.tls.clientCA -}}
{{- $_ := set $tls "client_ca" (printf "%s/tls/clients.crt" $directory) -}}
{{- end -}}
{{- if include "session-broker.isGiven" .Values.tls.clientCRL -}}
{{- $_ := set $tls "client_crl" (printf "%s/tls/clients.crl" $directory) -}}
{{- end -}}
{{- if $tls -}}{{- $_ := set $config "tls" $tls -}}{{- end -}}

{{- if .Values.commitTokenKey.existingSecret -}}
{{- $_ := set $config "commit_token_key_file" (printf "%s/commit-token-key" $directory) -}}
{{- end -}}
{{- if include "session-broker.isGiven" .Values.jwks.ca -}}
{{- $_ := set $config.authentication.jwt "jwks_ca" (printf "%s/jwks/ca.crt" $directory) -}}
{{- end -}}
{{- if include "session-broker.isGiven" .Values.jwks.keys -}}
{{- $_ := set $config.authentication.jwt "jwks_file" (printf "%s/jwks/jwks.json" $directory) -}}
{{- end -}}

{{- range $name, $secrets := .Values.engineSecrets -}}
{{- $engine := get $config.engines $name -}}
{{- $place := printf "%s/engines/%s" $directory $name -}}
{{- if $secrets.password -}}{{- $_ := set $engine "password_file" (printf "%s/password" $place) -}}{{- end -}}
{{- if $secrets.rootCert -}}{{- $_ := set $engine "ssl_root_cert" (printf "%s/root.crt" $place) -}}{{- end -}}
{{- if $secrets.clientCertificate -}}
{{- $_ := set $engine "ssl_cert" (printf "%s/tls.crt" $place) -}}
{{- $_ := set $engine "ssl_key" (printf "%s/tls.key" $place) -}}
{{- end -}}
{{- end -}}

{{- include "session-broker.wholeNumbers" $config -}}
{{- toToml $config | trim -}}
{{- end -}}

{{/* Makes the numbers of a map whole: values have none but floating-point ones, and the configuration none of those. */}}
{{- define "session-broker.wholeNumbers" -}}
{{- $map := . -}}
{{- range $key, $value := $map -}}
{{- if kindIs "map" $value -}}
{{- include "session-broker.wholeNumbers" $value -}}
{{- else if kindIs "float64" $value -}}
{{- $_ := set $map $key (int64 $value) -}}
{{- else if kindIs "slice" $value -}}
{{- $list := list -}}
{{- range $value -}}
{{- if kindIs "float64" . -}}{{- $list = append $list (int64 .) -}}{{- else -}}{{- $list = append $list . -}}{{- end -}}
{{- end -}}
{{- $_ := set $map $key $list -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What the broker would refuse at its start, and what does not belong into a ConfigMap. */}}
{{- define "session-broker.checkConfig" -}}
{{- $config := .Values.config -}}
{{- $tls := $config.tls | default dict -}}
{{- $authentication := $config.authentication | default dict -}}
{{- $jwt := $authentication.jwt | default dict -}}
{{- $engines := $config.engines | default dict -}}
{{- $clientCA := include "session-broker.isGiven" .Values.tls.clientCA -}}
{{- $clientCRL := include "session-broker.isGiven" .Values.tls.clientCRL -}}

{{- if not $engines -}}
{{- fail "config.engines: is empty: add config.engines.main with url: postgresql://USER@HOST/DATABASE, and its password as engineSecrets.main.password" -}}
{{- end -}}
{{- if and (gt (len $engines) 1) (not $config.default_engine) -}}
{{- fail "config.default_engine: is missing, and there is more than one engine: name one of them" -}}
{{- end -}}
{{- if and $config.default_engine (not (hasKey $engines $config.default_engine)) -}}
{{- fail (printf "config.default_engine: names %q, which is not among config.engines" $config.default_engine) -}}
{{- end -}}
{{- if not (or $authentication.anonymous $authentication.certificate $authentication.tokens $authentication.jwt) -}}
{{- fail "config.authentication: nobody could call: set certificate, tokens or jwt, or let everybody in with anonymous: true" -}}
{{- end -}}
{{- if not $config.principals -}}
{{- fail "config.principals: is empty, so nobody may do anything: name each caller, or anonymous for those who do not say who they are" -}}
{{- end -}}

{{- $encrypted := or .Values.tls.existingSecret $tls.certificate -}}
{{- if and (not $encrypted) (not $config.plaintext_beyond_loopback) -}}
{{- fail "tls.existingSecret: is empty, and callers would speak in plain text: name a secret with certificate and key, or set config.plaintext_beyond_loopback: true where something else encrypts, such as a service mesh" -}}
{{- end -}}
{{- if and $encrypted $config.plaintext_beyond_loopback -}}
{{- fail "config.plaintext_beyond_loopback: has no effect beside a certificate: remove it, or tls.existingSecret" -}}
{{- end -}}
{{- if and (not $encrypted) (or $clientCA $clientCRL $tls) -}}
{{- fail "tls.existingSecret: is empty: what tls and config.tls say of clients needs the server's own certificate" -}}
{{- end -}}
{{- if and .Values.tls.existingSecret (or $tls.certificate $tls.key) -}}
{{- fail "config.tls.certificate: stands beside tls.existingSecret: give one of them" -}}
{{- end -}}
{{- if and $clientCA $tls.client_ca -}}
{{- fail "config.tls.client_ca: stands beside tls.clientCA: give one of them" -}}
{{- end -}}
{{- if and $clientCRL $tls.client_crl -}}
{{- fail "config.tls.client_crl: stands beside tls.clientCRL: give one of them" -}}
{{- end -}}
{{- if and (or $clientCRL $tls.client_crl $tls.client_certificates) (not (or $clientCA $tls.client_ca)) -}}
{{- fail "tls.clientCA: is empty: tls.clientCRL and config.tls.client_certificates have no effect without the authorities that vouch for clients" -}}
{{- end -}}
{{- if and $authentication.certificate (not (or $clientCA $tls.client_ca)) -}}
{{- fail "config.authentication.certificate: has no effect without tls.clientCA, which vouches for clients' certificates" -}}
{{- end -}}

{{- range $what := list "ca" "keys" -}}
{{- if and (include "session-broker.isGiven" (get $.Values.jwks $what)) (not $authentication.jwt) -}}
{{- fail (printf "jwks.%s: has no effect without config.authentication.jwt" $what) -}}
{{- end -}}
{{- end -}}
{{- if and (include "session-broker.isGiven" .Values.jwks.ca) $jwt.jwks_ca -}}
{{- fail "config.authentication.jwt.jwks_ca: stands beside jwks.ca: give one of them" -}}
{{- end -}}
{{- if $authentication.jwt -}}
{{- $sources := compact (list $jwt.jwks_url $jwt.jwks_file (include "session-broker.isGiven" .Values.jwks.keys)) -}}
{{- if ne (len $sources) 1 -}}
{{- fail "config.authentication.jwt.jwks_url: say once where the issuer's keys are: with it, with jwks_file, or with the value jwks.keys" -}}
{{- end -}}
{{- end -}}

{{- if $config.commit_token_key -}}
{{- fail "config.commit_token_key: a ConfigMap is no place for a key: put it into a secret and name that in commitTokenKey.existingSecret" -}}
{{- end -}}
{{- if and .Values.commitTokenKey.existingSecret $config.commit_token_key_file -}}
{{- fail "config.commit_token_key_file: stands beside commitTokenKey.existingSecret: give one of them" -}}
{{- end -}}
{{- if $config.owner -}}
{{- fail "config.owner: is the pod's name, as every replica needs its own: remove it" -}}
{{- end -}}

{{- range $name, $engine := $engines -}}
{{- $url := $engine.url | default "" -}}
{{- if or $engine.password (regexMatch "^[a-z]+://[^/?@]*:[^/?]*@" $url) (regexMatch "[?&]password=" $url) -}}
{{- fail (printf "config.engines.%s: holds a password, and a ConfigMap is no place for it: put it into a secret and name that in engineSecrets.%s.password.existingSecret" $name $name) -}}
{{- end -}}
{{- end -}}
{{- range $name, $secrets := .Values.engineSecrets -}}
{{- if not (hasKey $engines $name) -}}
{{- fail (printf "engineSecrets.%s: there is no config.engines.%s" $name $name) -}}
{{- end -}}
{{- $engine := get $engines $name -}}
{{- range $key, $value := dict "password_file" $secrets.password "ssl_root_cert" $secrets.rootCert "ssl_cert" $secrets.clientCertificate "ssl_key" $secrets.clientCertificate -}}
{{- if and $value (hasKey $engine $key) -}}
{{- fail (printf "config.engines.%s.%s: stands beside engineSecrets.%s: give one of them" $name $key $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- range $key, $given := dict "config.listen" (dict "addresses" $config.listen "name" "grpc") "config.operations.listen" (dict "addresses" ($config.operations | default dict).listen "name" "operations") -}}
{{- if $given.addresses -}}
{{- $addresses := $given.addresses -}}
{{- if kindIs "string" $addresses -}}{{- $addresses = splitList "," $addresses -}}{{- end -}}
{{- $port := printf ":%d" (int64 (get $.Values.ports $given.name)) -}}
{{- $reached := false -}}
{{- range $addresses -}}{{- if hasSuffix $port (trim .) -}}{{- $reached = true -}}{{- end -}}{{- end -}}
{{- if not $reached -}}
{{- fail (printf "%s: has no address with the port %s of ports.%s" $key (trimPrefix ":" $port) $given.name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
