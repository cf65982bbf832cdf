{{/* Every name and every text that two templates share. The ConfigMap's name is fixed: a namespace holds one platform. */}}

{{- define "labelmill.platformName" -}}labelmill-platform{{- end }}
{{- define "labelmill.workerAccount" -}}{{ .Values.platform.service_accounts.worker }}{{- end }}
{{- define "labelmill.finalizeAccount" -}}{{ .Values.platform.service_accounts.finalize }}{{- end }}
{{- define "labelmill.submitterRole" -}}labelmill-submitter{{- end }}
{{- define "labelmill.finalizeRole" -}}labelmill-finalize{{- end }}
{{- define "labelmill.probeName" -}}labelmill-probe{{- end }}

{{- define "labelmill.labels" -}}
app.kubernetes.io/name: labelmill
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: labelmill
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* "true" where the chart brings the weights itself. */}}
{{- define "labelmill.prefetches" -}}
{{- if and .Values.prefetch.weights (not .Values.platform.models) -}}true{{- end -}}
{{- end }}

{{- define "labelmill.claim" -}}
{{- .Values.prefetch.volume.existing_claim | default "labelmill-models" -}}
{{- end }}

{{/* Folder of the weights: what they are, not where they come from. */}}
{{- define "labelmill.content" -}}
{{- $lines := list -}}
{{- range .Values.prefetch.weights -}}
{{- $lines = append $lines (list .path (.sha256 | default "") (.revision | default "") (.files | default dict | toJson) | join " ") -}}
{{- end -}}
{{- sortAlpha $lines | join "\n" | sha256sum | trunc 16 -}}
{{- end }}

{{/* A Job cannot be changed: whatever goes into it is in its name, and a later Job finds the folder READY. */}}
{{- define "labelmill.prefetchName" -}}
{{- $platform := pick .Values.platform "images" "env" "credentials_secret" "ca_bundle" "service_accounts" -}}
labelmill-prefetch-{{ list $platform .Values.prefetch .Values.run.storage .Chart.Version | toJson | sha256sum | trunc 8 }}
{{- end }}

{{/* What millctl reads: the values, and the weights that the chart brings. */}}
{{- define "labelmill.platform" -}}
{{- $platform := deepCopy .Values.platform -}}
{{- if include "labelmill.prefetches" . -}}
{{- $claim := include "labelmill.claim" . -}}
{{- $job := include "labelmill.prefetchName" . -}}
{{- $_ := set $platform "models" (dict "claim" $claim "content" (include "labelmill.content" .) "prefetch_job" $job) -}}
{{- end -}}
{{- toPrettyJson $platform -}}
{{- end }}

{{/* What all pods of the chart share; the restricted Pod Security Standard lets it pass. */}}
{{- define "labelmill.podSpec" -}}
restartPolicy: Never
serviceAccountName: {{ include "labelmill.workerAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.platform.images.pull_secrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "labelmill.podSecurity" -}}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "labelmill.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Environment of a container: each name once, the later wins. Arguments: root, extra. */}}
{{- define "labelmill.env" -}}
{{- $platform := .root.Values.platform -}}
{{- $env := dict -}}
{{- with $platform.ca_bundle -}}
{{- $_ := set $env "AWS_CA_BUNDLE" (dict "name" "AWS_CA_BUNDLE" "value" (printf "/etc/labelmill-ca/%s" (.key | default "ca.crt"))) -}}
{{- end -}}
{{- range concat $platform.env .extra -}}
{{- $_ := set $env .name . -}}
{{- end -}}
{{- $sorted := list -}}
{{- range keys $env | sortAlpha -}}
{{- $sorted = append $sorted (get $env .) -}}
{{- end -}}
{{- toYaml $sorted -}}
{{- end }}

{{- define "labelmill.mounts" -}}
- name: tmp
  mountPath: /tmp
{{- if .Values.platform.ca_bundle }}
- name: ca
  mountPath: /etc/labelmill-ca
  readOnly: true
{{- end }}
{{- end }}

{{- define "labelmill.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.platform.scratch }}
{{- with .Values.platform.ca_bundle }}
- name: ca
  configMap:
    name: {{ .config_map }}
{{- end }}
{{- end }}
