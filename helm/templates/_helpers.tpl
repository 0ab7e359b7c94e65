{{- define "internvl.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* LeaderWorkerSet and StatefulSet add up to 21 characters to it in a label, which has 63. */}}
{{- define "internvl.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 42 | trimSuffix "-" -}}
{{- else if contains (include "internvl.name" .) .Release.Name -}}
{{- .Release.Name | trunc 42 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "internvl.name" .) | trunc 42 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "internvl.instance" -}}
app.kubernetes.io/name: {{ include "internvl.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* The pods that answer: those of the Deployment, or the leaders. */}}
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

{{/* Name, namespace and labels of an object: (list $ "-suffix"). */}}
{{- define "internvl.metadata" -}}
{{- $root := first . -}}
name: {{ include "internvl.fullname" $root }}{{ last . }}
namespace: {{ $root.Release.Namespace | quote }}
labels:
  {{- include "internvl.labels" $root | nindent 2 }}
{{- end -}}

{{- define "internvl.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- $suffix := ternary "-cuda" "" (gt (int $.Values.gpu.count) 0) -}}
{{- printf "%s:%s" .repository (default (print $.Chart.AppVersion $suffix) .tag) -}}
{{- end -}}
{{- end -}}
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

{{/* The checkpoint's folder; empty: the demo model. */}}
{{- define "internvl.model" -}}
{{- with .Values.model -}}
{{- if .path -}}
{{- .path -}}
{{- else if .hub.name -}}
/models/{{ base .hub.name }}{{ with .hub.revision }}-{{ replace "/" "-" . }}{{ end }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "internvl.multiHost" -}}
{{- if gt (int .Values.hosts.size) 1 }}yes{{ end -}}
{{- end -}}

{{/* Whether the settings say themselves how the model is divided. */}}
{{- define "internvl.divided" -}}
{{- with .Values.settings -}}
{{- if or (hasKey . "tensor_parallel_size") (hasKey . "pipeline_parallel_size") }}yes{{ end -}}
{{- end -}}
{{- end -}}

{{/* How many processes of a model run in each pod. */}}
{{- define "internvl.processesHere" -}}
{{- if include "internvl.divided" . -}}
{{- with .Values.settings -}}
{{- $all := mul (default 1 .tensor_parallel_size) (default 1 .pipeline_parallel_size) -}}
{{- div $all $.Values.hosts.size -}}
{{- end -}}
{{- else -}}
{{- max 1 .Values.gpu.count -}}
{{- end -}}
{{- end -}}

{{/* Kind, name and version of what runs the pods. */}}
{{- define "internvl.workload" -}}
{{- if include "internvl.multiHost" . -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
name: {{ include "internvl.fullname" . }}-group
{{- else -}}
apiVersion: apps/v1
kind: Deployment
name: {{ include "internvl.fullname" . }}
{{- end -}}
{{- end -}}

{{/* The source of a volume that `volume` or `claim` of a value describes: (list $ value "name"). */}}
{{- define "internvl.volume" -}}
{{- $value := index . 1 -}}
{{- if $value.volume -}}
{{- toYaml $value.volume -}}
{{- else if $value.claim.existing -}}
persistentVolumeClaim: {claimName: {{ $value.claim.existing }}}
{{- else if $value.claim.create -}}
persistentVolumeClaim: {claimName: {{ include "internvl.fullname" (first .) }}-{{ last . }}}
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

{{/* Seconds that a start may take. */}}
{{- define "internvl.startup" -}}
{{- $probe := .Values.probes.startup -}}
{{- if $probe.failureThreshold -}}
{{- mul $probe.periodSeconds $probe.failureThreshold -}}
{{- else -}}
{{- $loading := max 600 (add 300 (mul 10 (trimSuffix "Gi" (default "0Gi" .Values.model.size) | int))) -}}
{{- add $loading (ternary 600 0 (eq (include "internvl.multiHost" .) "yes")) -}}
{{- end -}}
{{- end -}}

{{/* Of a pod's server or rank, GPUs included. */}}
{{- define "internvl.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- $gpus := int .Values.gpu.count -}}
{{- $size := trimSuffix "Gi" .Values.model.size | int -}}
{{- if $resources -}}
{{- else if gt $gpus 0 -}}
{{- $requests := dict "cpu" (mul 4 $gpus | toString) "memory" (mul 16 $gpus | printf "%dGi") -}}
{{- $resources = dict "requests" $requests "limits" (dict "memory" (mul 32 $gpus | printf "%dGi")) -}}
{{- else if $size -}}
{{- $memory := add 4 (mul 2 $size) | printf "%dGi" -}}
{{- $resources = dict "requests" (dict "cpu" "1" "memory" $memory) "limits" (dict "memory" $memory) -}}
{{- else -}}
{{- $resources = dict "requests" (dict "cpu" "1" "memory" "2Gi") "limits" (dict "memory" "4Gi") -}}
{{- end -}}
{{- if gt $gpus 0 -}}
{{- $resources = set $resources "limits" (set (default dict $resources.limits) .Values.gpu.resource $gpus) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "internvl.grace" -}}
{{- add .Values.preStopDelay (ceil .Values.drainTimeout) .Values.shutdownMargin -}}
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

{{/* Why checkov need not mind what it would: the annotations of whatever has pods. */}}
{{- define "internvl.excuses" -}}
checkov.io/skip1: CKV_K8S_15=a tag is never moved (latest is refused), so what a node has pulled is the image
checkov.io/skip2: CKV_K8S_43=image.digest names one where there is one; a chart cannot know that of your registry
{{- end -}}

{{- define "internvl.serverExcuses" -}}
{{ include "internvl.excuses" . }}
checkov.io/skip3: CKV_K8S_11=a limit would throttle bursts of a server while cores are idle; resources.limits sets one
{{- if include "internvl.secret" . }}
checkov.io/skip4: CKV_K8S_35=the server takes keys out of its environment at its start, no process it starts has them
{{- end }}
{{- end -}}

{{/* Public addresses only, as NetworkPolicy peers: no neighbours in the cluster, no metadata service. */}}
{{- define "internvl.public" -}}
- ipBlock:
    cidr: 0.0.0.0/0
    except:
      - 0.0.0.0/8
      - 10.0.0.0/8
      - 100.64.0.0/10
      - 127.0.0.0/8
      - 168.63.129.16/32
      - 169.254.0.0/16
      - 172.16.0.0/12
      - 192.0.0.0/24
      - 192.168.0.0/16
      - 198.18.0.0/15
      - 224.0.0.0/3
- ipBlock:
    cidr: 2000::/3
    except:
      # Addresses of IPv4 inside.
      - 2001::/32
      - 2002::/16
{{- end -}}

{{/* Refuses values that no schema can: said once, by the ConfigMap, which is always rendered. */}}
{{- define "internvl.checks" -}}
{{- $values := .Values -}}
{{- $many := or (gt (int $values.replicas) 1) $values.autoscaling.enabled (include "internvl.multiHost" .) -}}
{{- range $name, $value := dict "model" $values.model "cache" $values.cache -}}
{{- $sources := 0 -}}
{{- range list $value.volume $value.claim.existing $value.claim.create -}}
{{- if . }}{{ $sources = add1 $sources }}{{ end -}}
{{- end -}}
{{- if gt $sources 1 -}}
{{- fail (printf "%s: one of volume, claim.existing and claim.create" $name) -}}
{{- end -}}
{{- if and $value.claim.create (not (has "ReadWriteMany" $value.claim.accessModes)) -}}
{{- if $many -}}
{{- fail (printf "%s.claim.accessModes: pods on several nodes need ReadWriteMany" $name) -}}
{{- else if ne $values.strategy.type "Recreate" -}}
{{- fail (printf "strategy.type: %s.claim may be mounted on one node only, so the old pod has to go first: Recreate" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $hub := $values.model.hub -}}
{{- if $hub.name -}}
{{- if not (include "internvl.volume" (list . $values.model "models")) -}}
{{- fail "model.hub.name: where to? model.volume or model.claim" -}}
{{- end -}}
{{- if not (hasPrefix "/models/" (include "internvl.model" .)) -}}
{{- fail "model.path: what is fetched goes below /models" -}}
{{- end -}}
{{- if and (eq $hub.by "job") (or $values.model.volume.emptyDir (and $values.model.claim.create (not (has "ReadWriteMany" $values.model.claim.accessModes)))) -}}
{{- fail "model.hub.by: a job needs a volume that it shares with the pods (ReadWriteMany)" -}}
{{- end -}}
{{- end -}}
{{- if and (include "internvl.multiHost" .) (not $values.hosts.secret) -}}
{{- fail "hosts.secret: pods of a group need a secret" -}}
{{- end -}}
{{- if include "internvl.divided" . -}}
{{- $all := mul (default 1 $values.settings.tensor_parallel_size) (default 1 $values.settings.pipeline_parallel_size) -}}
{{- if mod $all $values.hosts.size -}}
{{- fail (printf "hosts.size: %d processes cannot be spread over %d pods" $all (int $values.hosts.size)) -}}
{{- else if and $values.gpu.count (gt (div $all $values.hosts.size) (int64 $values.gpu.count)) -}}
{{- fail (printf "gpu.count: %d processes in %d pods need more GPUs" $all (int $values.hosts.size)) -}}
{{- end -}}
{{- end -}}
{{- if and $values.serviceMonitor.enabled $values.podMonitor.enabled -}}
{{- fail "podMonitor.enabled: with serviceMonitor too everything would be counted twice" -}}
{{- end -}}
{{- if and $values.inferencePool.enabled $values.tls.existingSecret -}}
{{- fail "inferencePool.enabled: gateways speak plain HTTP to the pods of a pool; not with tls.existingSecret" -}}
{{- end -}}
{{- if and $values.autoscaling.enabled (eq $values.autoscaling.by "keda") (not $values.autoscaling.metrics) (not $values.autoscaling.keda.prometheus) -}}
{{- fail "autoscaling.keda.prometheus: where is Prometheus?" -}}
{{- end -}}
{{- if and $values.autoscaling.enabled (gt (int $values.autoscaling.minReplicas) (int $values.autoscaling.maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas: %d is more than the %d of maxReplicas" (int $values.autoscaling.minReplicas) (int $values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- end -}}
