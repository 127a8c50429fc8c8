//! The certificate files of the gateway: Envoy reloads replaced files on both of its sides.

use std::sync::Arc;

use hapa_engine_sim::Script;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_test_harness::{Gateway, MtlsCluster, within};
use hapa_transport::balancer::BalancedChannel;
use hapa_transport::connect::TransportSecurity;
use hapa_transport::tls::trust_roots;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::{make_key, question, with_key, with_tls};

/// The gateway's connections to codegen: number of certificate updates, and of opened connections.
const LOADED: &str = "cluster.codegen.client_ssl_socket_factory.ssl_context_update_by_sds";
const OPENED: &str = "cluster.codegen.upstream_cx_total";

/// The certificate that the gateway's port presents to a new connection.
async fn shown(gateway: &Gateway, mesh: &MtlsCluster) -> CertificateDer<'static> {
    within("a connection", gateway.certificate(&mesh.certificates.authority())).await
}

fn file(mesh: &MtlsCluster) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(mesh.certificates.files("gateway").certificate).unwrap()
}

fn client(gateway: &Gateway, mesh: &MtlsCluster) -> CodegenServiceClient<BalancedChannel> {
    let trust = trust_roots(Some(&mesh.certificates.authority())).unwrap();
    let secure = TransportSecurity::ServerTls(Arc::new(trust));
    let channel =
        BalancedChannel::new(&gateway.url, secure, std::time::Duration::from_secs(30)).unwrap();
    CodegenServiceClient::new(channel)
}

#[tokio::test]
async fn the_gateway_reloads_certificates_and_calls_in_progress_continue() {
    let mesh = MtlsCluster::start(&["--max-connection-age-seconds=1"]).await;
    let key = make_key(&mesh).await;
    let gateway = with_tls(&mesh).await;
    let first = file(&mesh);
    assert_eq!(shown(&gateway, &mesh).await, first);
    mesh.engine.once(Script::tokens(["a", "b", "c"]).hold(2));
    let asked = within("an answer", async {
        client(&gateway, &mesh).stream_generate_code(with_key(question(), &key)).await
    });
    let mut frames = asked.await.unwrap().into_inner();
    within("started", frames.message()).await.unwrap();
    within("a token", frames.message()).await.unwrap();

    let loaded = gateway.statistic(LOADED).await;
    mesh.certificates.renew().await;
    let second = file(&mesh);
    assert_ne!(first, second, "they were replaced");
    within("the gateway to show its new certificate", async {
        while shown(&gateway, &mesh).await != second {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // Connections to the mesh end with age, and new ones use the new certificate.
    within("the gateway to load what it shows to the mesh", async {
        while gateway.statistic(LOADED).await == loaded {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let opened = gateway.statistic(OPENED).await;
    within("new connections to the mesh", async {
        while gateway.statistic(OPENED).await < opened + 2 {
            let answer = client(&gateway, &mesh).generate_code(with_key(question(), &key)).await;
            answer.expect("no call fails meanwhile");
        }
    })
    .await;
    assert_eq!(gateway.statistic("cluster.codegen.ssl.fail_verify_error").await, 0);
    mesh.engine.release();
    let mut last = None;
    while let Some(frame) = within("the rest", frames.message()).await.expect("it goes on") {
        last = frame.event;
    }
    assert!(matches!(last, Some(Event::Finished(_))), "{last:?}");
    mesh.finish().await;
}
