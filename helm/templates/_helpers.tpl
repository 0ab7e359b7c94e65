{{- define "internvl.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "internvl.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "internvl.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "internvl.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "internvl.instance" -}}
app.kubernetes.io/name: {{ include "internvl.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* The pods that serve; the smoke test's pod is not one of them. */}}
{{- define "internvl.selector" -}}
{{ include "internvl.instance" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "internvl.labels" -}}
{{ include "internvl.instance" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "internvl.image" -}}
{{- $suffix := ternary "-cuda" "" (gt (int .Values.gpu.count) 0) -}}
{{- printf "%s:%s" .Values.image.repository (default (print .Chart.AppVersion $suffix) .Values.image.tag) -}}
{{- end -}}

{{- define "internvl.secret" -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- .Values.apiKeys.existingSecret -}}
{{- else if .Values.apiKeys.values -}}
{{- printf "%s-api-keys" (include "internvl.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* One setting as the text of its environment variable; Helm reads every number as a float. */}}
{{- define "internvl.setting" -}}
{{- if kindIs "slice" . -}}
{{- join "," . -}}
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{/* Secrets that are mounted as folders, so that their changes arrive: name of the folder, of the Secret. */}}
{{- define "internvl.secretFiles" -}}
{{- with .Values.apiKeys.fileSecret }}
keys: {{ . }}
{{- end }}
{{- with .Values.tls.existingSecret }}
tls: {{ . }}
{{- end }}
{{- with .Values.admin.existingSecret }}
admin: {{ . }}
{{- end }}
{{- end -}}

{{- define "internvl.scheme" -}}
{{- ternary "HTTPS" "HTTP" (ne .Values.tls.existingSecret "") -}}
{{- end -}}

{{- define "internvl.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "internvl.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
