{{/* OpenTelemetry's variables, as a list of environment, without those that extraEnv names itself. */}}
{{- define "session-broker.telemetryEnv" -}}
{{- include "session-broker.checkTelemetry" . -}}
{{- $name := include "session-broker.fullname" . -}}
{{- $directory := include "session-broker.directory" . -}}
{{- with .Values.telemetry -}}
{{- /* $(...) is Kubernetes' own: only variables that stand before are put in. */ -}}
{{- $attributes := dict "k8s.namespace.name" $.Release.Namespace (printf "k8s.%s.name" (lower $.Values.kind)) $name "k8s.container.name" "session-broker" "k8s.pod.name" "$(SESSION_BROKER__OWNER)" "k8s.node.name" "$(OTEL_RESOURCE_ATTRIBUTES_NODE_NAME)" "service.instance.id" (printf "%s.$(SESSION_BROKER__OWNER).session-broker" $.Release.Namespace) -}}
{{- $pairs := list -}}
{{- range $key, $value := merge (deepCopy .resourceAttributes) $attributes -}}
{{- $pairs = append $pairs (printf "%s=%s" $key $value) -}}
{{- end -}}
{{- $env := list
  (dict "name" "OTEL_SERVICE_NAME" "value" $name)
  (dict "name" "OTEL_RESOURCE_ATTRIBUTES_NODE_NAME" "valueFrom" (dict "fieldRef" (dict "fieldPath" "spec.nodeName")))
  (dict "name" "OTEL_RESOURCE_ATTRIBUTES" "value" (join "," $pairs))
-}}
{{- if .otlp.endpoint -}}
{{- $env = concat $env (list
  (dict "name" "OTEL_TRACES_EXPORTER" "value" (ternary "otlp" "none" .traces.enabled))
  (dict "name" "OTEL_METRICS_EXPORTER" "value" (ternary "otlp" "none" .metrics.enabled))
  (dict "name" "OTEL_LOGS_EXPORTER" "value" (ternary "otlp" "none" .logs.enabled))
  (dict "name" "OTEL_EXPORTER_OTLP_ENDPOINT" "value" .otlp.endpoint)
  (dict "name" "OTEL_EXPORTER_OTLP_PROTOCOL" "value" .otlp.protocol)
) -}}
{{- with .otlp.headersSecret -}}
{{- if .existingSecret -}}
{{- $env = append $env (dict "name" "OTEL_EXPORTER_OTLP_HEADERS" "valueFrom" (dict "secretKeyRef" (dict "name" .existingSecret "key" .key))) -}}
{{- end -}}
{{- end -}}
{{- if include "session-broker.isGiven" .otlp.certificate -}}
{{- $env = append $env (dict "name" "OTEL_EXPORTER_OTLP_CERTIFICATE" "value" (printf "%s/otlp/ca.crt" $directory)) -}}
{{- end -}}
{{- if .otlp.clientCertificate.existingSecret -}}
{{- $env = concat $env (list
  (dict "name" "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE" "value" (printf "%s/otlp/tls.crt" $directory))
  (dict "name" "OTEL_EXPORTER_OTLP_CLIENT_KEY" "value" (printf "%s/otlp/tls.key" $directory))
) -}}
{{- end -}}
{{- if .traces.enabled -}}
{{- $env = append $env (dict "name" "OTEL_TRACES_SAMPLER" "value" .traces.sampler) -}}
{{- if hasSuffix "traceidratio" .traces.sampler -}}
{{- $env = append $env (dict "name" "OTEL_TRACES_SAMPLER_ARG" "value" (toString .traces.samplerArg)) -}}
{{- end -}}
{{- end -}}
{{- if .metrics.enabled -}}
{{- $env = append $env (dict "name" "OTEL_METRIC_EXPORT_INTERVAL" "value" (include "session-broker.milliseconds" .metrics.interval)) -}}
{{- end -}}
{{- end -}}
{{- $given := list -}}
{{- range tpl (toYaml $.Values.extraEnv) $ | fromYamlArray -}}{{- $given = append $given .name -}}{{- end -}}
{{- $left := list -}}
{{- range $env -}}{{- if not (has .name $given) -}}{{- $left = append $left . -}}{{- end -}}{{- end -}}
{{- with $left -}}{{- toYaml . -}}{{- end -}}
{{- end -}}
{{- end -}}

{{/* What would be sent nowhere, or verified against nothing. */}}
{{- define "session-broker.checkTelemetry" -}}
{{- with .Values.telemetry.otlp -}}
{{- if and (not .endpoint) .headersSecret.existingSecret -}}
{{- fail "telemetry.otlp.headersSecret: has no effect without telemetry.otlp.endpoint" -}}
{{- end -}}
{{- if not (hasPrefix "https://" .endpoint) -}}
{{- if include "session-broker.isGiven" .certificate -}}
{{- fail "telemetry.otlp.certificate: has no effect without an endpoint that begins with https://" -}}
{{- end -}}
{{- if .clientCertificate.existingSecret -}}
{{- fail "telemetry.otlp.clientCertificate: has no effect without an endpoint that begins with https://" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
