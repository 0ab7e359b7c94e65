{{/* The pod that answers, or a further one of its group: (dict "root" $ "rank" true). */}}
{{- define "internvl.pod" -}}
{{- $rank := .rank -}}
{{- with .root -}}
{{- $multiHost := eq (include "internvl.multiHost" .) "yes" -}}
metadata:
  labels:
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- if and .Values.inferencePool.enabled (not $rank) }}
    # Tells the endpoint picker whose metrics' names to read.
    llm-d.ai/engine-type: internvl
    {{- end }}
    {{- include "internvl.instance" . | nindent 4 }}
    app.kubernetes.io/component: {{ ternary "rank" "server" $rank }}
  annotations:
    # A change of settings or keys rolls the pods.
    checksum/config: {{ include (print $.root.Template.BasePath "/configmap.yaml") . | sha256sum }}
    checksum/keys: {{ include (print $.root.Template.BasePath "/secret.yaml") . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  automountServiceAccountToken: false
  # Kubernetes' own variables for a service named "internvl" would be read as settings.
  enableServiceLinks: false
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  securityContext:
    {{- include "internvl.podSecurity" . | nindent 4 }}
  terminationGracePeriodSeconds: {{ include "internvl.grace" . }}
  {{- if .Values.model.hub.name }}
  initContainers:
    - {{ include "internvl.fetch" (dict "root" . "wait" (eq .Values.model.hub.by "job")) | nindent 6 | trim }}
  {{- end }}
  containers:
    - name: {{ ternary "rank" "server" $rank }}
      image: {{ include "internvl.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [{{ ternary "rank" "serve" $rank }}]
      envFrom:
        - configMapRef:
            name: {{ include "internvl.fullname" . }}
      {{- $secret := include "internvl.secret" . }}
      env:
        {{- if and $secret (not $rank) }}
        - name: INTERNVL_API_KEY
          valueFrom:
            secretKeyRef:
              name: {{ $secret }}
              key: {{ .Values.apiKeys.secretKey }}
        {{- end }}
        {{- if not (hasKey .Values.settings "threads") }}
        # The limit where there is one, else what the node has.
        - name: INTERNVL_THREADS
          valueFrom:
            resourceFieldRef:
              containerName: {{ ternary "rank" "server" $rank }}
              resource: limits.cpu
        {{- end }}
        {{- if include "internvl.volume" (list . .Values.cache "cache") }}
        - {name: TRITON_CACHE_DIR, value: /cache/triton}
        - {name: CUDA_CACHE_PATH, value: /cache/cuda}
        - {name: HF_HOME, value: /cache/hub}
        {{- end }}
        {{- with .Values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if $rank }}
      # Ready when each of its processes is a part of the group. No other probe: the leader replaces
      # what hangs, and a restart from here would end the answers of the whole group.
      readinessProbe:
        exec:
          command: [sh, -c, {{ printf "[ $(%s) -ge %s ]" (include "internvl.ranks" .) (include "internvl.processesHere" .) | quote }}]
        {{- toYaml .Values.probes.readiness | nindent 8 }}
      lifecycle:
        preStop:
          exec:
            # As long as the leader drains; SIGTERM would end its engine.
            command: [sh, -c, {{ include "internvl.ranks" . | printf "while [ $(%s) -gt 0 ]; do sleep 1; done" | quote }}]
      {{- else }}
      ports:
        - name: http
          containerPort: 8000
      startupProbe:
        httpGet: {path: /started, port: http, scheme: {{ include "internvl.scheme" . }}}
        {{- $startup := .Values.probes.startup }}
        periodSeconds: {{ $startup.periodSeconds }}
        timeoutSeconds: {{ $startup.timeoutSeconds }}
        failureThreshold: {{ divf (include "internvl.startup" .) $startup.periodSeconds | ceil }}
      readinessProbe:
        httpGet: {path: /ready, port: http, scheme: {{ include "internvl.scheme" . }}}
        {{- toYaml .Values.probes.readiness | nindent 8 }}
      livenessProbe:
        httpGet: {path: /live, port: http, scheme: {{ include "internvl.scheme" . }}}
        {{- toYaml .Values.probes.liveness | nindent 8 }}
      {{- if .Values.preStopDelay }}
      lifecycle:
        preStop:
          {{- if semverCompare ">=1.30-0" (default .Capabilities.KubeVersion.Version .Values.kubeVersion) }}
          sleep:
            seconds: {{ .Values.preStopDelay }}
          {{- else }}
          exec:
            command: [sleep, {{ .Values.preStopDelay | quote }}]
          {{- end }}
      {{- end }}
      {{- end }}
      securityContext:
        {{- include "internvl.containerSecurity" . | nindent 8 }}
      resources:
        {{- include "internvl.resources" . | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if include "internvl.volume" (list . .Values.model "models") }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- if include "internvl.volume" (list . .Values.cache "cache") }}
        - {name: cache, mountPath: /cache}
        {{- end }}
        {{- if $multiHost }}
        - {name: ranks, mountPath: /etc/internvl/ranks, readOnly: true}
        {{- end }}
        {{- if not $rank }}
        {{- range $folder, $_ := include "internvl.secretFiles" . | fromYaml }}
        - {name: {{ $folder }}, mountPath: /etc/internvl/{{ $folder }}, readOnly: true}
        {{- end }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: {{ .Values.tmp.sizeLimit }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .Values.shm.sizeLimit }}
    {{- with include "internvl.volume" (list . .Values.model "models") }}
    - name: models
      {{- . | nindent 6 }}
    {{- end }}
    {{- if and .Values.model.hub.tokenSecret (eq .Values.model.hub.by "init") }}
    - name: hub
      secret: {secretName: {{ .Values.model.hub.tokenSecret }}}
    {{- end }}
    {{- with include "internvl.volume" (list . .Values.cache "cache") }}
    - name: cache
      {{- . | nindent 6 }}
    {{- end }}
    {{- if $multiHost }}
    - name: ranks
      secret: {secretName: {{ .Values.hosts.secret }}}
    {{- end }}
    {{- if not $rank }}
    {{- range $folder, $secret := include "internvl.secretFiles" . | fromYaml }}
    - name: {{ $folder }}
      secret: {secretName: {{ $secret }}}
    {{- end }}
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml .Values.topologySpreadConstraints | nindent 4 }}
  {{- else if not $rank }}
  topologySpreadConstraints:
    {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "internvl.selector" $.root | nindent 10 }}
    {{- end }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* How many processes of a group run in this container. */}}
{{- define "internvl.ranks" -}}
grep -las 'engine[.]rank' /proc/[0-9]*/cmdline | wc -l
{{- end -}}

{{/* The container that fetches the checkpoint, or waits until somebody else has. */}}
{{- define "internvl.fetch" -}}
{{- $wait := .wait -}}
{{- with .root -}}
{{- $hub := .Values.model.hub -}}
name: fetch
image: {{ include "internvl.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args:
  - fetch
  - {{ $hub.name }}
  - --to={{ include "internvl.model" . }}
  {{- with $hub.revision }}
  - --revision={{ . }}
  {{- end }}
  {{- if $wait }}
  - --wait
  {{- end }}
env:
  # The image asks for all GPUs, and some runtimes would give them.
  - {name: NVIDIA_VISIBLE_DEVICES, value: void}
  {{- if not $wait }}
  - {name: HF_HUB_OFFLINE, value: "0"}
  # No second copy in /tmp.
  - {name: HF_XET_CHUNK_CACHE_SIZE_BYTES, value: "0"}
  {{- with $hub.endpoint }}
  - {name: HF_ENDPOINT, value: {{ . | quote }}}
  {{- end }}
  {{- if $hub.tokenSecret }}
  - {name: HF_TOKEN_PATH, value: {{ printf "/etc/internvl/hub/%s" $hub.tokenKey | quote }}}
  {{- end }}
  {{- end }}
securityContext:
  {{- include "internvl.containerSecurity" . | nindent 2 }}
resources:
  requests: {cpu: 500m, memory: 1Gi}
  limits: {cpu: "2", memory: 4Gi}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: models, mountPath: /models{{ if $wait }}, readOnly: true{{ end }}}
  {{- if and $hub.tokenSecret (not $wait) }}
  - {name: hub, mountPath: /etc/internvl/hub, readOnly: true}
  {{- end }}
{{- end -}}
{{- end -}}
