{{/* Names. 52 bytes leave room for "-headless" and for what controllers append. */}}
{{- define "session-broker.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "session-broker.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "session-broker.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "session-broker.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "session-broker.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "session-broker.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What selects the brokers, and not the pod of the test. */}}
{{- define "session-broker.selectorLabels" -}}
app.kubernetes.io/name: {{ include "session-broker.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: broker
{{- end -}}

{{/* Labels of pods, whichever. The chart's version is none of them: a new chart alone replaces no pod. */}}
{{- define "session-broker.sharedLabels" -}}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | trunc 63 | quote }}
app.kubernetes.io/part-of: session-broker
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "session-broker.labels" -}}
{{ include "session-broker.selectorLabels" . }}
{{ include "session-broker.sharedLabels" . }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "session-broker.testLabels" -}}
app.kubernetes.io/name: {{ include "session-broker.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: test
{{- end -}}

{{/* Whether IPv6 is among the service's families: then the address of all is [::], which takes IPv4 too. */}}
{{- define "session-broker.hasIPv6" -}}
{{- $policy := .Values.service.ipFamilyPolicy -}}
{{- if or (has "IPv6" .Values.service.ipFamilies) (eq $policy "PreferDualStack") (eq $policy "RequireDualStack") -}}true{{- end -}}
{{- end -}}

{{/* A host as it stands before a port. */}}
{{- define "session-broker.anyHost" -}}
{{- if include "session-broker.hasIPv6" . -}}[::]{{- else -}}0.0.0.0{{- end -}}
{{- end -}}

{{/* The whole milliseconds of a duration such as "1m 30s", in the units that the broker reads. */}}
{{- define "session-broker.milliseconds" -}}
{{- $sum := 0 -}}
{{- $units := dict "ms" 1 "msec" 1 "millis" 1 "s" 1000 "sec" 1000 "secs" 1000 "second" 1000 "seconds" 1000 "m" 60000 "min" 60000 "mins" 60000 "minute" 60000 "minutes" 60000 "h" 3600000 "hr" 3600000 "hrs" 3600000 "hour" 3600000 "hours" 3600000 -}}
{{- range $part := regexFindAll "[0-9.]+\\s*[a-zA-Zµ]+" . -1 -}}
{{- $number := regexFind "[0-9.]+" $part -}}
{{- $unit := regexFind "[a-zA-Zµ]+" $part -}}
{{- /* What is shorter is less than a millisecond, and what is longer is refused by the broker. */ -}}
{{- $sum = add $sum (mulf $number (get $units $unit | default 0) | ceil) -}}
{{- end -}}
{{- $sum -}}
{{- end -}}

{{/* How long a pod may take to stop. */}}
{{- define "session-broker.terminationGracePeriodSeconds" -}}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds -}}
{{- include "session-broker.stopSeconds" . -}}
{{- else -}}
{{- int64 .Values.terminationGracePeriodSeconds -}}
{{- end -}}
{{- end -}}

{{/* How long the broker may take to stop: its notice, its grace, and 12 s to roll back what is left and to log off. */}}
{{- define "session-broker.stopSeconds" -}}
{{- $notice := include "session-broker.milliseconds" (.Values.config.drain_notice | default "0s") | int64 -}}
{{- $grace := include "session-broker.milliseconds" (.Values.config.drain_grace | default "20s") | int64 -}}
{{- add 12 (div (add $notice $grace 999) 1000) -}}
{{- end -}}

{{/* What a reference {existingSecret, existingConfigMap} names; empty when it names nothing. */}}
{{- define "session-broker.isGiven" -}}
{{- if or .existingSecret .existingConfigMap -}}true{{- end -}}
{{- end -}}

{{/* A source of a projected volume. Takes dict: reference, items (of path by key), at (the value's name). */}}
{{- define "session-broker.source" -}}
{{- if and .reference.existingSecret .reference.existingConfigMap -}}
{{- fail (printf "%s: names a secret and a ConfigMap: give one of existingSecret and existingConfigMap" .at) -}}
{{- end -}}
{{- if .reference.existingSecret -}}
- secret:
    name: {{ .reference.existingSecret | quote }}
{{- else -}}
- configMap:
    name: {{ .reference.existingConfigMap | quote }}
{{- end }}
    items:
      {{- range $path, $key := .items }}
      - key: {{ $key | quote }}
        path: {{ $path }}
      {{- end }}
{{- end -}}

{{/* Whether there is a test: it must be able to prove who it is. */}}
{{- define "session-broker.isTested" -}}
{{- $config := .Values.config -}}
{{- $tls := $config.tls | default dict -}}
{{- $asked := or (include "session-broker.isGiven" .Values.tls.clientCA) $tls.client_ca -}}
{{- $required := and $asked (ne ($tls.client_certificates | default "required") "optional") -}}
{{- $certificate := .Values.tests.clientCertificate.existingSecret -}}
{{- $anonymous := ($config.authentication | default dict).anonymous -}}
{{- if and .Values.tests.enabled (or $certificate (not $required)) (or $anonymous $certificate .Values.tests.token.existingSecret) -}}true{{- end -}}
{{- end -}}
