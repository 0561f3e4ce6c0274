{{- define "ems-vllm.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "ems-vllm.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "ems-vllm.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "ems-vllm.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "ems-vllm.selector" -}}
app.kubernetes.io/name: {{ include "ems-vllm.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "ems-vllm.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "ems-vllm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "ems-vllm.claim" -}}
{{- default (printf "%s-cache" (include "ems-vllm.fullname" .)) .Values.cache.existingClaim }}
{{- end }}

{{- /* Labels of this release's series in Prometheus. */ -}}
{{- define "ems-vllm.series" -}}
{{- default (printf "namespace=%q,service=%q" .Release.Namespace (include "ems-vllm.fullname" .)) .Values.autoscaling.prometheus.selector }}
{{- end }}

{{- /* What cannot work is refused before anything is created. */ -}}
{{- define "ems-vllm.check" -}}
{{- $several := or (gt (int .Values.replicas) 1) (and .Values.autoscaling.enabled (gt (int .Values.autoscaling.maxReplicas) 1)) }}
{{- if and $several .Values.cache.enabled (not .Values.cache.existingClaim) (not (has "ReadWriteMany" .Values.cache.accessModes)) }}
{{- fail "cache.accessModes has no ReadWriteMany, and pods on other nodes could not mount the claim: add it where the storage class allows it, name a claim in cache.existingClaim, or set cache.enabled to false" }}
{{- end }}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) }}
{{- fail "autoscaling.minReplicas is more than autoscaling.maxReplicas: lower it" }}
{{- end }}
{{- if lt (int .Values.terminationGracePeriodSeconds) 15 }}
{{- fail "terminationGracePeriodSeconds is less than the 15 s in which the server ends: raise it" }}
{{- end }}
{{- end }}
